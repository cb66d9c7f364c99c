"""A run in the files of its trackers after kills: one run, and each step once, with the value in the run's own log."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import PartialState

from training.monitoring.trackers import PROJECT, start_tracker
from training.settings.reading import parse_config

# Of each process: the first step, of a checkpoint or 0; the step before which the tracker's records end; and the step
# before which the process was killed.
PROCESSES = [(0, 24, 24), (20, 27, 27), (25, 26, 29), (28, 31, 31)]


@pytest.fixture(autouse=True)
def state_of_accelerate():
    PartialState(cpu=True)  # without it its trackers cannot log


def loss(process: int, step: int) -> float:
    return 9 / (step + 1) + process


def log_and_resume(name: str, folder: Path) -> dict[int, float]:
    """Logs a run of several processes; returns the losses that its own records have in the end."""
    losses: dict[int, float] = {}
    for process, (first, logged, killed) in enumerate(PROCESSES):
        lines = [{"step": step, "loss": losses[step], "data": {}} for step in range(first)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sample = {"step": 10, "prompt": "a ", "text": "b"}
        (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n" if first > 10 else "")
        config = parse_config(["--output_dir", str(folder), "--run_name", f"name{process}"])
        tracker = start_tracker(name, config, first)
        for step in range(first, killed):
            losses[step] = loss(process, step)
            if step < logged or name == "tensorboard":  # which writes each step at once
                tracker.log({"loss": losses[step], **({"sample/0": "a b"} if step == 10 else {})}, step=step)
        tracker.finish()
    return losses


def test_tensorboard_shows_each_step_once(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    losses = log_and_resume("tensorboard", tmp_path)
    (folder,) = {file.parent for file in tmp_path.rglob("events.*")}
    shown = accumulators.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in shown.Scalars("loss")] == list(losses)
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx(list(losses.values()))
    assert [event.step for event in shown.Tensors("sample/0/text_summary")] == [10]
    assert b"run_name: name0" in shown.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]


def test_wandb_has_one_run_with_each_step_once(tmp_path, monkeypatch):
    """Offline: what is in its files, which `wandb sync` sends."""
    pytest.importorskip("wandb")
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    losses = log_and_resume("wandb", folder)
    assert list(tmp_path.iterdir()) == [folder]  # nothing in ./wandb
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    runs, steps = [], []
    for record in wandb_records(file.read_bytes()):
        if record.HasField("run"):
            runs.append((record.run.project, record.run.run_id))
        if record.HasField("history"):
            items = record.history.item
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            steps.append((values["_step"], values["loss"], values.get("sample/0")))
    assert set(runs) == {(PROJECT, json.loads((folder / "trackers.json").read_text())["wandb"])}
    assert steps == [(step, value, "a b" if step == 10 else None) for step, value in losses.items()]


def test_what_wandb_s_server_has_is_not_sent_again(tmp_path, monkeypatch):
    """A stand-in for wandb, whose server has 22 steps when the run is resumed from a checkpoint of step 25."""
    starts, sent = [], []
    run = SimpleNamespace(starting_step=0, log=lambda values, step: sent.append((step, values)), finish=lambda: None)
    module = ModuleType("wandb")
    module.init = lambda **options: starts.append(options) or run
    module.config = SimpleNamespace(update=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config = parse_config(["--output_dir", str(tmp_path / "name")])
    (tmp_path / "name").mkdir()
    start_tracker("wandb", config, 0)
    lines = [{"step": step, "loss": loss(0, step)} for step in range(25)]
    (tmp_path / "name" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "name" / "samples.jsonl").touch()
    run.starting_step = 22
    tracker = start_tracker("wandb", config, 25)
    assert sent == [(step, {"loss": loss(0, step)}) for step in (22, 23, 24)]
    run.starting_step = 27  # of a rollback
    tracker = start_tracker("wandb", config, 25)
    for step in (25, 26, 27):
        tracker.log({"loss": 1.0}, step=step)
    assert [step for step, _ in sent] == [22, 23, 24, 27]
    assert starts[0] == starts[1] == starts[2] and starts[0]["resume"] == "allow" and starts[0]["name"] == "name"
    assert (starts[0]["project"], starts[0]["dir"]) == ("mine", str(tmp_path / "name"))


def wandb_records(content: bytes) -> Iterator:
    """The records of a `.wandb` file: after 7 bytes a log in LevelDB's format, of blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, record = 7, b""
    while position + 7 <= len(content):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        _, size, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole one, or the last part of one
            yield Record.FromString(record)
            record = b""

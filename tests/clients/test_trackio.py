"""Runs that report to trackio: what it has stored, read by trackio itself."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import launch, run_command
from forks import begin
from plants import die, in_step, no_network
from standin_hub import StandIn, serve

from training.monitoring.trackers import PROJECT

pytestmark = pytest.mark.clients
RECORDS = """
import json, sys, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs(sys.argv[1])
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs(sys.argv[1], run.name, run_id=run.id)]))
"""


@pytest.fixture
def flags(short_steps) -> list[str]:
    return [*short_steps, "--max_steps", "6", "--save_steps", "3", "--eval_steps", "3", "--report_to", "trackio"]


@pytest.fixture(autouse=True)
def default_folder(monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)


def stored(folder: Path) -> tuple[str, dict, list[dict]]:
    """The name of the one run in `folder`, its settings and its logs."""
    environment = os.environ | {"TRACKIO_DIR": str(folder)}
    done = run_command(sys.executable, "-c", RECORDS, PROJECT, cwd=folder, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def losses(logs: list[dict]) -> list[list]:
    return [[line["step"], line["loss"]] for line in logs if line.get("loss") is not None]


def test_trackio_has_the_metrics_of_the_run_and_asks_nobody(flags, tmp_path):
    """Every number of every step, and the samples; a resumed run goes on in the same records."""
    samples = ["--sample_every", "3", "--sample_tokens", "4", "--sample_prompts", "import"]
    run = begin([*flags, *samples, "--run_name", "seen"], tmp_path, no_network).finished("seen")
    resume = ["--run_name", "seen", "--resume_from_checkpoint", "--max_steps", "8", "--override", "max_steps"]
    run = begin(resume, tmp_path, no_network).finished("seen")
    name, settings, logs = stored(run.folder / "trackio")
    assert name == "seen" and settings["max_steps"] == "8"

    found: dict[int, dict] = {}
    for line in logs:
        found.setdefault(line["step"], {}).update(line)
    for step, expected in run.metrics().items():
        numbers = {name: value for name, value in expected.items() if name not in ("data", "message")}
        assert numbers == {name: found[step][name] for name in numbers}
    assert losses(logs) == [[step, loss] for step, loss in enumerate(run.losses())]
    texts = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    assert len(texts) == 3  # steps 3, 6 and 8
    assert [found[text["step"]]["sample/0"] for text in texts] == [text["prompt"] + text["text"] for text in texts]


def test_each_step_of_a_killed_run_is_there_once(flags, tmp_path):
    """trackio writes behind a run's back: what waits is lost with it."""
    samples = ["--sample_every", "3", "--sample_tokens", "4", "--sample_prompts", "import"]
    words = [*flags, *samples, "--max_steps", "12", "--run_name", "seen"]
    assert begin(words, tmp_path, partial(in_step, 10, 0, die)).ended()[0] != 0
    run = begin([*words, "--resume_from_checkpoint"], tmp_path, no_network).finished("seen")
    _, _, logs = stored(run.folder / "trackio")
    assert losses(logs) == [[step, loss] for step, loss in enumerate(run.losses())]
    assert [line["step"] for line in logs if "val_loss" in line] == [0, 3, 6, 9, 12]
    assert [line["step"] for line in logs if "sample/0" in line] == [3, 6, 9, 12]


def test_a_hub_that_does_not_answer_does_not_hold_a_run(flags, tmp_path):
    """trackio asks it for the name of the owner of a token, if there is one."""
    with serve(StandIn(failing="hang")) as hub:
        launch(*flags, "--max_steps", "1", "--run_name", "alone", cwd=tmp_path, env=os.environ | hub.environment())
        assert "GET /api/whoami-v2" in hub.requests
    assert (tmp_path / "runs" / "alone" / "trackio" / f"{PROJECT}.db").is_file()

"""A screen that is gone, a lost terminal, a tracker that fails, or data that vanish: the run keeps what it has done."""

import io
import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from forks import begin
from plants import in_step, signalled

pytestmark = pytest.mark.processes


@pytest.fixture(scope="session")
def flags(short_steps) -> list[str]:
    words = "--eval_steps 3 --save_steps 6 --max_steps 6 --run_name run --logging_steps 1 --auto_resume"
    return [*short_steps, *words.split()]


def disk_full() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    for number in (1, 2):
        os.dup2(full, number)


def closed_from_the_start() -> None:
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None


def closed_under_the_object() -> None:
    sys.stdout.close()


def ascii_only() -> None:
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(1), "wb", buffering=0), encoding="ascii", write_through=True)


GONE = [None, disk_full, closed_from_the_start, closed_under_the_object]


@pytest.mark.parametrize("plant", GONE, ids=["... | head -3", *(plant.__name__ for plant in GONE[1:])])
def test_a_screen_that_is_gone_does_not_end_a_run(flags, tmp_path, plant):
    if plant is None:
        words = " ".join([sys.executable, str(ROOT / "training" / "train.py"), *flags])
        script = f"{words} | head -3; exit ${{PIPESTATUS[0]}}"
        done = run_command("bash", "-c", script, cwd=tmp_path, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
        assert len(done.stdout.splitlines()) == 3
    else:
        begin(flags, tmp_path, plant).ended_with(0)
    run = tmp_path / "runs" / "run"
    assert (run / "checkpoints" / "step_00000006" / "COMPLETE").exists() and (run / "report" / "report.md").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    output = [line["message"] for line in lines if "message" in line]
    assert len(output) == 1 and "stdout is gone (" in output[0] and "the run continues without it" in output[0]
    assert sum("loss" in line for line in lines) == 6


def test_a_screen_that_knows_ascii_only_shows_the_rest_escaped(flags, tmp_path):
    prompt = ["--sample_every", "6", "--sample_prompts", "caf\u00e9 \u65e5", "--sample_tokens", "2"]
    assert "caf\\xe9 \\u65e5" in begin([*flags, *prompt], tmp_path, ascii_only).ended_with(0)


def hang_up_unheard(folder: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalled("forward", 230, folder, signal.SIGHUP)


def test_under_nohup_a_lost_terminal_is_nothing(flags, tmp_path):
    text = begin(flags, tmp_path, partial(hang_up_unheard, tmp_path / "runs" / "run")).ended_with(0)
    assert "stopped after" not in text, text
    assert (tmp_path / "runs" / "run" / "report" / "report.md").exists()


def vanish(step: int, folder: Path) -> None:
    in_step(step, 0, partial(shutil.rmtree, folder, ignore_errors=True))


def overwrite(step: int, folder: Path) -> None:
    """An id beyond the vocabulary in every shard but the first of training."""

    def act() -> None:
        import numpy as np

        for shard in sorted(folder.glob("*_train_*.npy"))[1:]:
            tokens = np.load(shard)
            tokens[5] = 60_000
            np.save(folder / "new.npy", tokens)  # the thread that reads ahead never sees half of it
            (folder / "new.npy").rename(shard)

    in_step(step, 0, act)


@pytest.mark.parametrize(("plant", "message"), [(vanish, "no such file"), (overwrite, "the largest id 60000")])
def test_data_that_go_bad_in_mid_run_end_it_with_a_checkpoint(flags, data_folder, tmp_path, plant, message):
    data = shutil.copytree(data_folder, tmp_path / "data")
    # In order, so that the next shard is opened at a known step: 20,011 tokens after its start.
    words = [*flags, "--data", data, "--order", "sequential", "--batch_tokens", "4096", "--max_steps", "20"]
    text = begin(words, tmp_path, partial(plant, 2, data)).ended_with(2)
    assert message in text and "--resume_from_checkpoint continues from the last checkpoint" in text, text
    saved = sorted((tmp_path / "runs" / "run" / "checkpoints").glob("step_*/COMPLETE"))
    metrics = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    done = max(line["step"] for line in metrics if "loss" in line) + 1
    assert saved[-1].parent.name == f"step_{done:08d}" and done > 2
    assert (saved[-1].parent / "tokenizer.json").exists()
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(data_folder, data)
    resumed = begin(words, tmp_path).finished("run")
    assert f"from step {done}" in resumed.stdout and len(resumed.losses()) == 20


def tracker_fails() -> None:
    from accelerate import tracking

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the server of the tracker is gone")

    tracking.TensorBoardTracker.log = tracking.TensorBoardTracker.finish = fail


def test_a_tracker_that_fails_does_not_end_a_run(short_steps, tmp_path):
    words = [*short_steps, "--max_steps", "3", "--report_to", "tensorboard", "--run_name", "run"]
    proxy = {"ALL_PROXY": "socks://127.0.0.1:9"}  # with which the Hub could not be asked, and nobody asks it
    run = begin(words, tmp_path, tracker_fails, proxy).finished("run")
    assert run.stdout.count("tensorboard is switched off: ConnectionError: the server of the tracker is gone") == 1
    assert len(run.losses()) == 3 and run.checkpoints

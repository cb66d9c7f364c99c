"""A tracker that fails in mid-run."""

import pytest
from conftest import TINY_MODEL
from forks import begin

pytestmark = pytest.mark.processes


def tracker_fails() -> None:
    from accelerate import tracking

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the server of the tracker is gone")

    tracking.TensorBoardTracker.log = tracking.TensorBoardTracker.finish = fail


def test_a_tracker_that_fails_does_not_end_a_run(data_folder, tmp_path):
    pytest.importorskip("tensorboard")
    words = ["--data", data_folder, *TINY_MODEL, "--max_steps", "3", "--warmup_steps", "0", "--batch_tokens", "512"]
    words += ["--micro_batch", "8", "--val_tokens", "512", "--report_to", "tensorboard", "--run_name", "run"]
    run = begin(words, tmp_path, tracker_fails).finished("run")
    assert (
        run.stdout.count("the trackers get nothing any more: ConnectionError: the server of the tracker is gone") == 1
    )
    assert len(run.losses()) == 3 and run.checkpoints

"""A tracker that fails in mid-run."""

import pytest
from forks import begin

pytestmark = pytest.mark.processes


def tracker_fails() -> None:
    from accelerate import tracking

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the server of the tracker is gone")

    tracking.TensorBoardTracker.log = tracking.TensorBoardTracker.finish = fail


def test_a_tracker_that_fails_does_not_end_a_run(short_steps, tmp_path):
    pytest.importorskip("tensorboard")
    words = [*short_steps, "--max_steps", "3", "--report_to", "tensorboard", "--run_name", "run"]
    proxy = {"ALL_PROXY": "socks://127.0.0.1:9"}  # with which the Hub could not be asked, and nobody asks it
    run = begin(words, tmp_path, tracker_fails, proxy).finished("run")
    assert run.stdout.count("tensorboard is switched off: ConnectionError: the server of the tracker is gone") == 1
    assert len(run.losses()) == 3 and run.checkpoints

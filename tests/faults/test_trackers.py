"""A tracker that fails in mid-run, and what trackers have of a run that was killed."""

from functools import partial

import pytest
from accelerate import Accelerator
from forks import begin
from plants import die, in_step

from training.records.trackers import _wandb
from training.settings.parsing import parse_config

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


def test_tensorboard_has_each_step_of_a_killed_run_once(short_steps, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    words = [*short_steps, "--max_steps", "12", "--save_steps", "4", "--report_to", "tensorboard", "--run_name", "run"]
    assert begin(words, tmp_path, partial(in_step, 10, 0, die)).ended()[0] != 0
    run = begin([*words, "--resume_from_checkpoint"], tmp_path).finished("run")
    multiplexer = EventMultiplexer(size_guidance={"scalars": 0})
    multiplexer.AddRunsFromDirectory(str(run.folder)).Reload()
    (name,) = multiplexer.Runs()
    losses = [(event.step, event.value) for event in multiplexer.Scalars(name, "loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in enumerate(run.losses())]


def test_wandb_s_run_is_the_same_after_a_restart(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    config, accelerator = parse_config(["--output_dir", str(tmp_path / "mine")]), Accelerator(cpu=True)
    first, second = (_wandb(config, accelerator) for _ in range(2))
    assert first.init_kwargs == second.init_kwargs and first.init_kwargs["resume"] == "allow"
    assert first.run_name == "gpt-accelerate" and first.init_kwargs["name"] == "mine"
    assert first.init_kwargs["dir"] == str(tmp_path / "mine")
    other = _wandb(parse_config(["--output_dir", str(tmp_path / "other")]), accelerator)
    assert other.init_kwargs["id"] != first.init_kwargs["id"]
    monkeypatch.setenv("WANDB_PROJECT", "lm")
    assert _wandb(config, accelerator).run_name == "lm"

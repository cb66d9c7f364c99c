"""The step timer on a simulated stream: a device that works behind the host, and two clocks."""

import pytest
import torch

from training.records import step_metrics
from training.records.step_metrics import StepTimer


class Stream:
    """A device that does one thing after the other, and a host that is ahead of it."""

    def __init__(self):
        self.host = self.done = 0.0

    def enqueue(self, seconds):
        """The host gives the device work, and continues."""
        self.done = max(self.done, self.host) + seconds

    def wait(self):
        self.host = max(self.host, self.done)


class Event:
    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.time = max(self.stream.done, self.stream.host)

    def synchronize(self):
        self.stream.host = max(self.stream.host, self.time)

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(step_metrics, "new_event", lambda device: Event(stream))
    return stream


def launch(steps, step, loss=1.0, stop=0.0):
    names = ["loss", "z_loss", "grad_norm", "data_wait", "memory_bytes", "stop"]
    by_rank = torch.tensor([[loss, 0.0, 2.0, 0.01, 5e9, stop], [loss + 1, 0.0, 2.0, 0.03, 7e9, 0.0]])
    about = {"step": step, "batch": (0, 1), "tokens": 0, "batch_tokens": 1000, "learning_rate": 0.1}
    return steps.launch(names, by_rank, **about)


def test_the_throughput_of_each_step_is_right_before_and_after_evaluations(stream):
    steps, seconds, seen = StepTimer(torch.device("cpu")), [0.5, 0.1, 0.2, 0.3, 0.2, 0.4], {}

    def finish(done):
        if done is not None:
            metrics, _ = done.finish()
            seen[done.step] = metrics["tokens_per_second"]

    for step, took in enumerate(seconds):
        if step in (2, 4):  # an evaluation, which begins when all that was launched has been recorded
            finish(steps.take())
            stream.enqueue(10)
            stream.wait()
            stream.host += 3
        steps.begin()
        stream.host += 0.01  # that it takes to launch a step
        stream.enqueue(took)
        finish(launch(steps, step))
        if step == 5:
            finish(steps.take())
    # A step that nothing is in front of waits for its launch.
    launched = [0.01 if step in (0, 2, 4) else 0 for step in range(6)]
    assert seen == pytest.approx({n: 1000 / (seconds[n] + launched[n]) for n in range(6)}, rel=0.01)


def test_the_host_does_not_wait_for_the_step_behind(stream):
    """It reads a step's numbers when that one is done, with the next one's work still before it."""
    steps = StepTimer(torch.device("cpu"))
    for step in range(2):
        steps.begin()
        stream.enqueue(1.0)
        done = launch(steps, step)
    done.finish()
    assert (stream.host, stream.done) == (1.0, 2.0)


def test_metrics_of_all_ranks(stream):
    steps = StepTimer(torch.device("cpu"))
    steps.begin()
    stream.enqueue(2.0)
    assert launch(steps, 0, stop=1.0) is None
    metrics, stop = steps.take().finish()
    assert stop and steps.take() is None
    assert metrics["loss"] == 1.5 and next(iter(metrics)) == "loss" and metrics["grad_norm"] == 2.0
    assert metrics["data_wait"] == pytest.approx(0.01) and metrics["memory_bytes"] == 7e9

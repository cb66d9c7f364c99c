"""The queue of launched steps on a simulated device that works behind the host."""

from types import SimpleNamespace

import pytest
import torch

from training.monitoring import metrics as step_metrics
from training.monitoring.metrics import LaunchedStep, MetricsQueue
from training.settings.schedule import Step


class Stream:
    """A device that does one thing after the other, and a host that is ahead of it."""

    def __init__(self):
        self.host = self.done = 0.0

    def enqueue(self, seconds):
        """The host gives the device work, and continues."""
        self.done = max(self.done, self.host) + seconds

    def wait(self):
        self.host = max(self.host, self.done)


@pytest.fixture
def stream(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(step_metrics, "time", SimpleNamespace(perf_counter=lambda: stream.host))
    return stream


def launched(stream, step, loss=1.0, stop=0.0):
    """A step of two ranks whose end is the end of all that the device has been given so far."""
    names = ["loss", "z_loss", "grad_norm", "data_wait", "memory_bytes", "stop"]
    by_rank = torch.tensor([[loss, 0.0, 2.0, 0.01, 5e9, stop], [loss + 1, 0.0, 2.0, 0.03, 7e9, 0.0]])
    end = stream.done

    def synchronize():
        stream.host = max(stream.host, end)

    values = dict(zip(names, by_rank.unbind(dim=1), strict=True))
    return LaunchedStep(Step(step, (0, 1), 0, 1000, 0.1, 0.1, False), values, SimpleNamespace(synchronize=synchronize))


@pytest.mark.parametrize("depth", [0, 1])
def test_throughput_excludes_evaluations_at_any_depth(stream, depth):
    queue, seconds, seen = MetricsQueue(depth), [0.5, 0.1, 0.2, 0.3, 0.2, 0.4], {}

    def read(step):
        if step is not None:
            seen[step.step.number] = queue.read(step)[0]["tokens_per_second"]

    for step, took in enumerate(seconds):
        if step in (2, 4):  # an evaluation, which begins when all that was launched has been read
            read(queue.pop())
            stream.enqueue(10)
            stream.wait()
            stream.host += 3
        queue.begin()
        stream.host += 0.01  # that it takes to launch a step
        stream.enqueue(took)
        read(queue.push(launched(stream, step)))
    read(queue.pop())
    # A step that nothing is in front of waits for its launch.
    delays = [0.01 if depth == 0 or step in (0, 2, 4) else 0 for step in range(6)]
    assert seen == pytest.approx({n: 1000 / (seconds[n] + delays[n]) for n in range(6)}, rel=0.01)


def test_the_host_does_not_wait_for_the_step_behind(stream):
    """It reads a step's numbers when that one is done, with the next one's work still before it."""
    queue = MetricsQueue(depth=1)
    for step in range(2):
        queue.begin()
        stream.enqueue(1.0)
        done = queue.push(launched(stream, step))
    queue.read(done)
    assert (stream.host, stream.done) == (1.0, 2.0)


def test_metrics_of_all_ranks(stream):
    queue = MetricsQueue(depth=1)
    queue.begin()
    stream.enqueue(2.0)
    assert queue.push(launched(stream, 0, stop=1.0)) is None
    metrics, stop = queue.read(queue.pop())
    assert stop and queue.pop() is None
    assert metrics["loss"] == 1.5 and next(iter(metrics)) == "loss" and metrics["grad_norm"] == 2.0
    assert metrics["data_wait"] == pytest.approx(0.01) and metrics["memory_bytes"] == 7e9

"""`Run`: everything that the training loop works with; and requests to stop it."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn

from data_prep.common.command_line import first_line
from modeling import GPTModel, flops_per_token
from training.checkpointing.store import RunState
from training.checkpointing.writer import Saver
from training.engine.data import Batch, Data, Prefetcher
from training.engine.distributed import describe_device
from training.monitoring.log import RunLog
from training.monitoring.metrics import MetricsQueue, peak_flops
from training.monitoring.trackers import start_tracker
from training.publishing import Uploads
from training.settings.schedule import Step
from training.settings.schema import TrainingConfig

# Two signals this close are one Ctrl-C: the terminal sends it to every process, and launchers pass it on.
_SAME_SIGNAL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
# From schedulers and launchers, Slurm's warnings, a lost terminal, the limit of processor time.
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)


class EvaluationStopped(Exception):
    """The ranks have agreed to stop in the middle of an evaluation."""


@dataclass
class Evaluation:
    """Something that is evaluated every N steps, and after the last one.

    Attributes:
        every: steps between two evaluations; 0 for never.
        at_start: also before the first step.
        at_checkpoints: also whenever a checkpoint is saved.
    """

    at_start: ClassVar[bool] = False
    at_checkpoints: ClassVar[bool] = False
    every: int

    def run(self, run: "Run") -> dict[str, Any]:
        """Evaluates the model and returns its metrics by name; texts are for trackers only. Collective. Calls
        `run.check_stop` between batches."""
        raise NotImplementedError


class StopRequest:
    """A request to this process to stop: true once it is made, with its reason. Ranks agree before they act on it."""

    def __init__(self, max_minutes: float | None) -> None:
        self.reason: str | None = None
        self.interrupted_at: float | None = None
        self.max_minutes = max_minutes
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.request(f"max_minutes={self.max_minutes:g}")
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Makes the request, unless there is one already."""
        self.reason = self.reason or reason

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Makes the request; a second Ctrl-C ends the process at once."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is None:
                self.interrupted_at = now
                if os.environ.get("RANK", "0") == "0":
                    # Not print(): the signal may interrupt one.
                    with contextlib.suppress(OSError):  # the screen is gone
                        os.write(2, b"\nstopping after this step; Ctrl-C again to stop at once\n")
            elif now - self.interrupted_at > _SAME_SIGNAL_SECONDS:
                raise KeyboardInterrupt
        self.request(signal.Signals(number).name)


@contextlib.contextmanager
def stop_requests(max_minutes: float | None) -> Iterator[StopRequest]:
    """Handles Ctrl-C, the end of the launcher, the end of `max_minutes` and `_STOP_SIGNALS` as requests to stop. Under
    `nohup` SIGHUP stays ignored."""
    request = StopRequest(max_minutes)
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        # The launcher of a single process passes no signal on: this process would stay and hold the devices. So the
        # system sends SIGTERM when the launcher dies.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, request.on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """Everything that the training loop works with; a context manager that closes it.

    Attributes:
        model: as `accelerator.prepare` returns it, possibly wrapped.
        micro_batch: sequences in one forward pass of one process.
        tokenizer_files: contents keyed by name; they go into each checkpoint.
        prefetcher: this rank's part of a global batch, by its position.
        evaluations: in the order in which they run.
        stop: request to this process to end the run.
        metrics: launched steps whose metrics have not been read yet.
        first_step: step at which this process began, or to which it rolled back: there is nothing to save at it.
        saved_step: last step whose checkpoint is in this run's folder; None if there is none.
        uploads: background uploader; None if disabled or rank != 0.
        stopping: whether the ranks have agreed to stop.
    """

    config: TrainingConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    micro_batch: int
    tokenizer_files: dict[str, bytes]
    data: Data
    prefetcher: Prefetcher
    evaluations: list[Evaluation]
    state: RunState
    log: RunLog
    saver: Saver
    stop: StopRequest
    metrics: MetricsQueue
    first_step: int
    saved_step: int | None
    uploads: Uploads | None = None
    stopping: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.config.checkpoints

    @property
    def bare_model(self) -> GPTModel:
        """The model without wrappers, for what needs no gradients."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def is_over(self) -> bool:
        return self.stopping or self.state.step == self.config.max_steps

    @property
    def save_due(self) -> bool:
        step = self.state.step
        return step == self.config.max_steps or (step > 0 and step % self.config.checkpointing.save_steps == 0)

    @property
    def is_own_step(self) -> bool:
        """Whether the weights are those of a step of this run, not those that it began with."""
        return self.state.step != self.first_step or self.state.step == self.saved_step

    def next_step(self) -> Step:
        """Plans the next step from the state and the settings alone."""
        state, length = self.state, self.config.sequence_length
        consumed = state.position * length
        batch_tokens = self.config.batch_plan.size(consumed)
        batch = (state.position, state.position + batch_tokens // length)
        factor = self.config.schedule.at(state.step, consumed, batch_tokens)
        return Step(
            number=state.step,
            batch=batch,
            tokens=consumed + batch_tokens,
            batch_tokens=batch_tokens,
            learning_rate_factor=factor,
            learning_rate=factor * self.config.optimizer.learning_rate,
            is_skipped=any(batch[0] < stop and first < batch[1] for first, stop in state.skipped),
        )

    def micro_batches(self, step: Step) -> list[Batch]:
        """This rank's part of the batch of a step; starts the clock of the step."""
        self.metrics.begin()
        return self.prefetcher.take(*step.batch)

    def due_evaluations(self) -> list[Evaluation]:
        """Returns the evaluations that are due before the next step."""
        step = self.state.step
        return [
            evaluation
            for evaluation in self.evaluations
            if evaluation.every
            and (
                step == self.config.max_steps
                or (self.save_due and evaluation.at_checkpoints)
                or (step % evaluation.every == 0 and (step > 0 or evaluation.at_start))
            )
        ]

    def log_metrics(self, values: dict[str, Any], step: int) -> None:
        """Logs values to every tracker. One that fails is dropped, unless it is the run's own log."""
        for tracker in list(self.accelerator.trackers):
            try:
                tracker.log(values, step=step)
            except Exception as error:  # each tracker has errors of its own
                if tracker is self.log:
                    raise
                self._switch_off(tracker, error)

    def restart_trackers(self) -> None:
        """Continues every tracker but the run's own log at the step of the state, after a rollback."""
        trackers = self.accelerator.trackers
        for tracker in trackers[1:]:
            try:
                tracker.finish()
                trackers[trackers.index(tracker)] = start_tracker(tracker.name, self.config, self.state.step)
            except Exception as error:  # as above
                self._switch_off(tracker, error)

    def _switch_off(self, tracker: GeneralTracker, error: Exception) -> None:
        self.accelerator.trackers.remove(tracker)
        self.log.print(f"{tracker.name} is switched off: {type(error).__name__}: {first_line(error)}")

    def print_saver_messages(self) -> None:
        """Prints the results of the checkpoints that were being written."""
        for message in self.saver.messages():
            self.log.print(message)

    def flops_utilization(self, tokens_per_second: float) -> float | None:
        """The model FLOPs utilization (MFU) of all devices; None where their peak is not known."""
        peak = peak_flops(describe_device(self.accelerator.device), self.accelerator.mixed_precision)
        if peak is None:
            return None
        flops = flops_per_token(self.bare_model.config, self.config.sequence_length)
        return flops * tokens_per_second / (peak * self.accelerator.num_processes)

    def agree_on_stopping(self, done: bool = True) -> bool:
        """Sets `stopping` on all ranks if any is asked to stop. Collective. Returns whether all ranks are `done`."""
        asked, finished = self.sum_over_processes(float(bool(self.stop)), float(done))
        self.stopping |= asked > 0
        return finished == self.accelerator.num_processes

    def check_stop(self, done: bool = True) -> bool:
        """As `agree_on_stopping`; raises `EvaluationStopped` on all ranks if any is asked to stop."""
        all_done = self.agree_on_stopping(done)
        if self.stopping:
            raise EvaluationStopped
        return all_done

    @property
    def stop_reason(self) -> str:
        return self.stop.reason or "another process was asked to"

    def sum_over_processes(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64 where the device has it. Collective."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.accelerator.device)).tolist()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        """Ends the threads, the logs, the trackers and the process group."""
        self.saver.close()
        self.print_saver_messages()
        self.prefetcher.close()
        self.log.finish()
        if error is not None:
            if self.uploads is not None:
                self.uploads.close()
            return  # other ranks may be waiting in the process group for this one, and its end tells them
        # The wrapped model goes first. As the last owner of the process group it would wait for the group's threads
        # while it holds the interpreter's lock, which they may be waiting for.
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
        self.accelerator.end_training()

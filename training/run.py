"""`Run`: everything that the training loop works with, and how a run ends."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import nn

from data_prep.common.command_line import first_line
from eval.report import PAGE_NAME
from modeling import GPTModel, flops_per_token
from training.checkpointing.store import RunState, checkpoint_folder
from training.checkpointing.writer import Saver
from training.engine.data import Batch, Data, Prefetcher
from training.engine.distributed import describe_device
from training.monitoring.log import RunLog
from training.monitoring.metrics import MetricsQueue, peak_flops
from training.monitoring.stopping import StopRequest
from training.monitoring.trackers import start_tracker
from training.publishing import Uploads
from training.settings.schedule import BatchPlan, Schedule, Step
from training.settings.schema import TrainingConfig


class EvaluationStopped(Exception):
    """The ranks have agreed to stop in the middle of an evaluation."""


class Evaluation(Protocol):
    """Something that is evaluated every N steps, and after the last one.

    Attributes:
        every: steps between two evaluations; 0 for never.
        at_start: also before the first step.
        at_checkpoints: also whenever a checkpoint is saved.
    """

    every: int
    at_start: bool
    at_checkpoints: bool

    def run(self, run: "Run") -> dict[str, Any]:
        """Evaluates the model and returns its metrics by name; texts are for trackers only. Collective. Calls
        `run.check_stop` between batches."""


@dataclass
class Run:
    """Everything that the training loop works with.

    Attributes:
        model: as `accelerator.prepare` returns it, possibly wrapped.
        micro_batch: sequences in one forward pass of one process.
        batch_plan, schedule: batch size and learning rate of each step.
        tokenizer_files: contents keyed by name; they go into each checkpoint.
        prefetcher: this rank's part of a global batch, by its position.
        evaluations: in the order in which they run.
        uploads: background uploader; None if disabled or rank != 0.
        stop: request to this process to end the run.
        metrics: launched steps whose metrics have not been read yet.
        first_step: step at which this process began, or to which it rolled back: there is nothing to save at it.
        saved_step: last step whose checkpoint is in this run's folder; None if there is none.
        stopping: whether the ranks have agreed to stop.
    """

    config: TrainingConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    micro_batch: int
    batch_plan: BatchPlan
    schedule: Schedule
    tokenizer_files: dict[str, bytes]
    data: Data
    prefetcher: Prefetcher
    evaluations: list[Evaluation]
    state: RunState
    log: RunLog
    saver: Saver
    uploads: Uploads | None
    stop: StopRequest
    metrics: MetricsQueue
    first_step: int
    saved_step: int | None
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
        batch_tokens = self.batch_plan.size(consumed)
        batch = (state.position, state.position + batch_tokens // length)
        factor = self.schedule.at(state.step, consumed, batch_tokens)
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
        for tracker in self.accelerator.trackers[1:]:
            try:
                tracker.finish()
                restarted = start_tracker(tracker.name, self.config, self.state.step)
            except Exception as error:  # as above
                self._switch_off(tracker, error)
            else:
                self.accelerator.trackers[self.accelerator.trackers.index(tracker)] = restarted

    def _switch_off(self, tracker: GeneralTracker, error: Exception) -> None:
        self.accelerator.trackers.remove(tracker)
        self.log.print(f"{tracker.name} is switched off: {type(error).__name__}: {first_line(error)}")

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
        """The reason why the ranks stop."""
        return self.stop.reason or "another process was asked to"

    def sum_over_processes(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64 where the device has it. Collective."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.accelerator.device)).tolist()

    def close(self, failed: bool = False) -> None:
        """Ends the threads, the logs, the trackers and the process group.

        The wrapped model goes first. As the last owner of the process group it would wait for the group's threads while
        it holds the interpreter's lock, which they may be waiting for.

        Args:
            failed: leave the process group as it is: other ranks may be waiting for this one, and its end tells them.
        """
        self.prefetcher.close()
        self.log.close()
        if failed:
            if self.uploads is not None:
                self.uploads.close()
            return
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
        self.accelerator.end_training()


def write_run_report(run: Run) -> None:
    """Writes the report of the run."""
    run.log.close()
    if not run.accelerator.is_main_process:
        return
    from eval.report import write_report
    from eval.reporting.records import read_run

    try:
        write_report([read_run(run.config.run_folder)], run.config.report_folder)
    except Exception as error:  # the records were changed meanwhile; the run itself has succeeded
        print(f"no report: {first_line(error)}")


def print_ending(run: Run) -> None:
    """Prints where the run has ended, its results, and commands to try next."""
    if not run.accelerator.is_main_process:
        return
    folder, last = run.config.run_folder, checkpoint_folder(run.checkpoints, run.state.step)
    if run.stopping:
        remedy = (
            f"the same command with --resume_from_checkpoint continues from {last}"
            if last.exists()
            else "this run has no checkpoint yet"
        )
        print(f"\nstopped after step {run.state.step} ({run.stop_reason}); {remedy}")
        return
    repository = run.config.hub.hub_model_id
    report = run.config.report_folder / PAGE_NAME
    longer = ["accelerate", "launch", "training/train.py", f"{folder}/config.yaml", "--output_dir", f"{folder}_longer"]
    longer += ["--max_steps", str(2 * run.config.max_steps)]
    longer += ["--hub_model_id", f"{repository}_longer"] if run.config.hub.push_to_hub else []
    prompt = next(iter(run.config.evaluation.sample_prompts), "")
    commands = [
        ["python", "-m", "eval.generate", str(last), "--prompt", prompt],
        ["python", "-m", "eval.loss", str(last), "--data", run.data.names[0]],
        longer,
    ]
    if not run.config.hub.push_to_hub:
        commands.append(["python", "-m", "training.publish", str(folder), "--hub_model_id", "USER/NAME"])
    print(
        f"\nreport           {report if report.exists() else 'was not written'}\n"
        f"last checkpoint  {last}\n"
        f"best checkpoint  {_best_checkpoint(run)}\n"
        "\nNow try",
        *map(shlex.join, commands),
        sep="\n  ",
    )


def _best_checkpoint(run: Run) -> str:
    if run.state.best_step is None:
        return "none: no validation loss was finite"
    folder = checkpoint_folder(run.checkpoints, run.state.best_step)
    return f"{folder if folder.exists() else 'was not written'} (validation loss {run.state.best_val_loss:.4f})"

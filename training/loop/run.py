"""`Run`: all that the training loop works with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data_prep.common.command_line import first_line
from eval.hellaswag import HellaSwag
from modeling import GPTModel, flops_per_token
from training.checkpointing.storage import RunState
from training.checkpointing.writer import Saver
from training.engine.batches import Batches, Prefetcher
from training.engine.data import Data
from training.engine.distributed import describe_device
from training.loop.stopping import StopRequest
from training.publishing.uploader import Uploads
from training.records.flops import peak_flops
from training.records.run_log import RunLog
from training.records.step_metrics import Meter
from training.settings.schedule import BatchPlan, Schedule
from training.settings.schema import TrainingConfig


@dataclass
class Run:
    """What the training loop works with.

    Attributes:
        model: as `accelerator.prepare` returns it, in the wrappers of distribution if there are any.
        batch_plan, schedule: the tokens and the learning rate of each step.
        prefetcher: this rank's share of a global batch, by its position.
        tokenizer_files: their contents by their names, which go into each checkpoint.
        val_sequences: sequences of a validation, always the first ones of the validation split.
        val_bytes: bytes of text that their labels stand for.
        hellaswag: its items under each rule that is asked for.
        task_manager: what the lm-evaluation-harness knows of its tasks; None if none are asked for.
        uploads: to the Hub; None if there are none, and but on the main process.
        tracking: whether the trackers still take what they are given.
        stop: this process's request to end the run, and `stopping`, what all of them have agreed on.
        meter: of the steps, with the one that has not been recorded yet.
    """

    config: TrainingConfig
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_plan: BatchPlan
    schedule: Schedule
    tokenizer: Any
    tokenizer_files: dict[str, bytes]
    data: Data
    train_data: Batches
    prefetcher: Prefetcher
    val_data: Batches
    val_sequences: int
    val_bytes: int
    hellaswag: list[HellaSwag]
    task_manager: Any
    state: RunState
    log: RunLog
    saver: Saver
    uploads: Uploads | None
    stop: StopRequest
    meter: Meter
    stopping: bool = False
    tracking: bool = True

    @property
    def checkpoints(self) -> Path:
        return self.config.checkpoints

    @property
    def bare_model(self) -> GPTModel:
        """The model without wrappers, for what needs no gradients."""
        return self.accelerator.unwrap_model(self.model)

    def flops_utilisation(self, tokens_per_second: float) -> float | None:
        """The share of all devices' peak that training's arithmetic takes (MFU); None where the peak is not known."""
        peak = peak_flops(describe_device(self.accelerator.device), self.accelerator.mixed_precision)
        if peak is None:
            return None
        flops = flops_per_token(self.bare_model.config, self.config.sequence_length)
        return flops * tokens_per_second / (peak * self.accelerator.num_processes)

    def track(self, values: dict[str, Any], step: int) -> None:
        """Give values of a step to the trackers; once one of them fails, the run goes on without them."""
        if not self.tracking:
            return
        try:
            self.accelerator.log(values, step=step)
        except Exception as error:  # theirs, of whatever kind
            self.tracking = False
            self.log.print(f"the trackers get nothing any more: {type(error).__name__}: {first_line(error)}")

    def close(self, failed: bool = False) -> None:
        """End the threads, the logs, the trackers and the process group.

        The wrapped model goes first: as the last owner of the process group it would wait for the group's threads while
        holding the interpreter's lock, which they may be waiting for.

        Args:
            failed: leave the process group as it is, whose other processes may be waiting for this one: its end is what
                tells them.
        """
        self.prefetcher.close()
        self.log.close()
        if failed:
            if self.uploads is not None:
                self.uploads.close()
            return
        self.model, self.optimizer = self.accelerator.free_memory(self.model, self.optimizer)
        if not self.tracking:
            self.accelerator.trackers = []  # which would fail again
        self.accelerator.end_training()

    def sum_over_processes(self, *values: float) -> list[float]:
        """Each of `values` summed over all processes, in float64 where the device has it."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=self.accelerator.device)).tolist()

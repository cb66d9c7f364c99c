"""What a step took, measured without making the host wait for the device."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from eval.launch import peak_memory


@dataclass
class StepInFlight:
    """A step that the device may still be at.

    Attributes:
        step: its number, from 0.
        batch: its sequences, as the positions of the first and of the one after the last.
        tokens: of the run, this step's included.
        batch_tokens: of this step, over all processes.
        learning_rate: AdamW's.
        started: when it began, in seconds of `time.perf_counter`.
        grad_norm: of the global batch, on the device.
        of_processes: `[P, 5]`, on the device: each process's loss, its z-loss, seconds waited for data, peak memory,
            and 1 where it has been asked to stop.
    """

    step: int
    batch: tuple[int, int]
    tokens: int
    batch_tokens: int
    learning_rate: float
    started: float
    grad_norm: Tensor
    of_processes: Tensor

    def finish(self, before: float) -> tuple[dict[str, Any], bool]:
        """Wait for the device, and say what the step gave and took, and whether any process is to stop.

        A device works at one step after the other: this one's time counts from when the one before was done.

        Args:
            before: when that was.
        """
        measures = self.of_processes.tolist()
        loss, z_loss, waited, _, stop = (sum(column) / len(measures) for column in zip(*measures, strict=True))
        grad_norm = self.grad_norm.item()
        seconds = time.perf_counter() - max(self.started, before)
        metrics = {
            "loss": loss,
            **({"z_loss": z_loss} if z_loss else {}),
            "learning_rate": self.learning_rate,
            "grad_norm": grad_norm,
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "tokens_per_second": self.batch_tokens / seconds,
            "data_wait": waited / seconds,
            "memory_bytes": int(max(memory for *_, memory, _ in measures)),
        }
        return metrics, stop > 0


def over_processes(accelerator: Accelerator, results: dict[str, Tensor], waited: float, stop: bool) -> Tensor:
    """`StepInFlight.of_processes`, of all processes, without waiting for the device."""
    host = torch.tensor([waited, peak_memory(accelerator.device), stop], dtype=torch.float32)
    if accelerator.device.type == "cuda":
        host = host.pin_memory().to(accelerator.device, non_blocking=True)
    mine = torch.cat((results["loss"][None], results["z_loss"][None], host.to(accelerator.device)))
    return accelerator.gather(mine).view(-1, 5)

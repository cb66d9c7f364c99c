"""What a step gave and took, read without making the host wait for the step after it."""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from eval.common.devices import peak_memory

_OF_A_PROCESS = ("loss", "z_loss", "data_wait", "memory", "stop")


class Event(Protocol):
    """A point in the work of a device, as `torch.cuda.Event` has it."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class HostEvent:
    """The same where the host has waited for the device when it records one."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing: it has happened."""

    def elapsed_time(self, end: "HostEvent") -> float:
        """Milliseconds from this event to `end`."""
        return 1000 * (end.time - self.time)


def new_event(device: torch.device) -> Event:
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()


def to_host(tensor: Tensor) -> Tensor:
    """The tensor on the host: from CUDA it is there once an event that is recorded after this has happened."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose numbers have not been read yet.

    Attributes:
        step: its number, from 0.
        batch: its sequences, as the positions of the first and of the one after the last.
        tokens: of the run, this step's included.
        batch_tokens: of this step, over all processes.
        learning_rate: AdamW's.
        start, end: of the device's work on it.
        grad_norm: of the global batch, `[1]`.
        of_processes: `[P, 5]`: each process's `_OF_A_PROCESS`.
    """

    step: int
    batch: tuple[int, int]
    tokens: int
    batch_tokens: int
    learning_rate: float
    start: Event
    end: Event
    grad_norm: Tensor
    of_processes: Tensor

    def finish(self) -> tuple[dict[str, Any], bool]:
        """Wait for the step, and for no work behind it; its metrics, and whether any process is to stop."""
        self.end.synchronize()
        seconds = self.start.elapsed_time(self.end) / 1000
        columns = dict(zip(_OF_A_PROCESS, self.of_processes.T.tolist(), strict=True))
        loss, z_loss, waited = (sum(columns[name]) / len(columns[name]) for name in ("loss", "z_loss", "data_wait"))
        metrics = {
            "loss": loss,
            **({"z_loss": z_loss} if z_loss else {}),
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm.item(),
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "tokens_per_second": self.batch_tokens / seconds,
            "data_wait": waited / seconds,
            "memory_bytes": int(max(columns["memory"])),
        }
        return metrics, any(columns["stop"])


class Meter:
    """Times steps by the device's own clock, one after the other, and holds the one that it may still be at."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launched: LaunchedStep | None = None
        self.start = new_event(device)

    def begin(self) -> None:
        """A step begins: where the one before it ends, or now if there is none on the device."""
        if self.launched is None:
            self.start = new_event(self.device)
            self.start.record()
        else:
            self.start = self.launched.end

    def launch(self, grad_norm: Tensor, of_processes: Tensor, **about: Any) -> LaunchedStep | None:
        """The step that has begun is on the device, its numbers with it; returns the one before it, if there is one.

        Args:
            about: the other attributes of `LaunchedStep`.
        """
        numbers = {"grad_norm": to_host(grad_norm.reshape(1)), "of_processes": to_host(of_processes)}
        end = new_event(self.device)
        end.record()
        before, self.launched = self.launched, LaunchedStep(start=self.start, end=end, **numbers, **about)
        return before

    def take(self) -> LaunchedStep | None:
        """The step that is on the device, which is no longer held."""
        launched, self.launched = self.launched, None
        return launched


def over_processes(accelerator: Accelerator, results: dict[str, Tensor], waited: float, stop: bool) -> Tensor:
    """`LaunchedStep.of_processes`, of all processes, on the device, without waiting for it. Collective."""
    host = torch.tensor([waited, peak_memory(accelerator.device), stop], dtype=torch.float32)
    if accelerator.device.type == "cuda":
        host = host.pin_memory().to(accelerator.device, non_blocking=True)
    mine = torch.cat((results["loss"][None], results["z_loss"][None], host.to(accelerator.device)))
    return accelerator.gather(mine).view(-1, len(_OF_A_PROCESS))

"""Metrics of a training step, read without making the host wait for the next step."""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from eval.common.devices import peak_memory


class Event(Protocol):
    """A point in the work of a device, as `torch.cuda.Event`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Any) -> float: ...


class HostEvent:
    """A time stamp of the host, for devices without events."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Does nothing: the event has happened."""

    def elapsed_time(self, end: "HostEvent") -> float:
        """Milliseconds from this event to `end`."""
        return 1000 * (end.time - self.time)


def new_event(device: torch.device) -> Event:
    return torch.cuda.Event(enable_timing=True) if device.type == "cuda" else HostEvent()


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; from CUDA it is complete after an event that is recorded after this call."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


@dataclass(frozen=True)
class LaunchedStep:
    """A launched step whose metrics have not been read yet.

    Attributes:
        step: its number, from 0.
        batch: its sequences, as the positions of the first and of the one after the last.
        tokens: consumed by the run, this step's included.
        batch_tokens: of this step, over all ranks.
        learning_rate: of this step; Muon's may have another peak.
        start, end: of the device's work on it.
        by_rank: by the name of each metric its values, `[P]`, one for each rank.
    """

    step: int
    batch: tuple[int, int]
    tokens: int
    batch_tokens: int
    learning_rate: float
    start: Event
    end: Event
    by_rank: dict[str, Tensor]

    def finish(self) -> tuple[dict[str, Any], bool]:
        """Waits for this step, but not for later work; returns its metrics, and whether any rank is to stop.

        Metrics that have no other rule here are means over the ranks.
        """
        self.end.synchronize()
        seconds = self.start.elapsed_time(self.end) / 1000
        by_rank = {name: values.tolist() for name, values in self.by_rank.items()}
        stop, memory, grad_norm = (by_rank.pop(name) for name in ("stop", "memory_bytes", "grad_norm"))
        means = {name: sum(values) / len(values) for name, values in by_rank.items()}
        waited, z_loss = means.pop("data_wait"), means.pop("z_loss")
        metrics = {
            **means,
            **({"z_loss": z_loss} if z_loss else {}),
            "learning_rate": self.learning_rate,
            "grad_norm": grad_norm[0],  # of the global batch: the same on all ranks
            "tokens": self.tokens,
            "batch_tokens": self.batch_tokens,
            "tokens_per_second": self.batch_tokens / seconds,
            "data_wait": waited / seconds,
            "memory_bytes": int(max(memory)),
        }
        return metrics, any(stop)


class StepTimer:
    """Times steps by the device's clock, one after the other, and holds the last launched one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launched: LaunchedStep | None = None
        self.start = new_event(device)

    def begin(self) -> None:
        """Begins a step: at the end of the launched one, or now if there is none."""
        if self.launched is None:
            self.start = new_event(self.device)
            self.start.record()
        else:
            self.start = self.launched.end

    def launch(self, names: list[str], by_rank: Tensor, **step: Any) -> LaunchedStep | None:
        """Notes that all work of the step is launched; returns the step before it, if there is one.

        Args:
            names, by_rank: metrics, as `gather_metrics` gives them.
            step: the other attributes of `LaunchedStep`.
        """
        host = to_host(by_rank)
        end = new_event(self.device)
        end.record()
        columns = dict(zip(names, host.unbind(dim=1), strict=True))
        before, self.launched = self.launched, LaunchedStep(start=self.start, end=end, by_rank=columns, **step)
        return before

    def take(self) -> LaunchedStep | None:
        """Returns the launched step, and forgets it."""
        launched, self.launched = self.launched, None
        return launched


def gather_metrics(
    accelerator: Accelerator, results: dict[str, Tensor], waited: float, stop: bool
) -> tuple[list[str], Tensor]:
    """The metrics of a step from all ranks, without waiting for the device. Collective.

    Args:
        results: scalars on the device, by name, as `training_step` returns them.
        waited: seconds that this rank waited for data.
        stop: whether this rank is asked to stop.

    Returns:
        Their N names, and `[P, N]` on the device.
    """
    on_host = {"data_wait": waited, "memory_bytes": peak_memory(accelerator.device), "stop": stop}
    host = torch.tensor(list(on_host.values()), dtype=torch.float32)
    if accelerator.device.type == "cuda":
        host = host.pin_memory().to(accelerator.device, non_blocking=True)
    mine = torch.cat(
        (torch.stack([result.reshape(()) for result in results.values()]).float(), host.to(accelerator.device))
    )
    names = [*results, *on_host]
    return names, accelerator.gather(mine).view(-1, len(names))

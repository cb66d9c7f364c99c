"""Metrics of a training step, read without making the host wait for the next step."""

import contextlib
import re
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from eval.common.devices import peak_memory
from training.settings.schedule import Step

# Dense tensor-core peaks at bf16 of the vendors' data sheets, in FLOP/s. A device that is not here has no known peak.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
}


@dataclass(frozen=True)
class LaunchedStep:
    """A launched step whose metrics have not been read yet.

    Attributes:
        values: per-rank values keyed by metric, each `[world_size]` on the host once `done` has happened.
        done: end of the device's work on it; None if the values are there already.
    """

    step: Step
    values: dict[str, Tensor]
    done: torch.cuda.Event | None


@dataclass
class MetricsQueue:
    """Queue of launched steps: on CUDA the host reads one while the device works on the next.

    Attributes:
        depth: steps that may wait in it: 1 on CUDA, else 0.
        started: when the device began with the oldest of them, on the host's clock.
    """

    depth: int
    started: float = 0.0
    steps: list[LaunchedStep] = field(default_factory=list)

    def begin(self) -> None:
        """Starts the clock of a step, unless an earlier step is still queued: then it starts at that one's end."""
        if not self.steps:
            self.started = time.perf_counter()

    def push(self, step: LaunchedStep) -> LaunchedStep | None:
        """Adds a step; returns the oldest if more than `depth` are in the queue."""
        self.steps.append(step)
        return self.pop() if len(self.steps) > self.depth else None

    def pop(self) -> LaunchedStep | None:
        """Removes the oldest step and returns it, None if the queue is empty."""
        return self.steps.pop(0) if self.steps else None

    def read(self, launched: LaunchedStep) -> tuple[dict[str, Any], bool]:
        """Waits for a popped step but not for later work; returns its metrics, and whether any rank is asked to stop.

        Metrics without a rule of their own here are means over the ranks.
        """
        if launched.done is not None:
            launched.done.synchronize()
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        values = {name: by_rank.tolist() for name, by_rank in launched.values.items()}
        stop, memory, grad_norm = (values.pop(name) for name in ("stop", "memory_bytes", "grad_norm"))
        means = {name: sum(by_rank) / len(by_rank) for name, by_rank in values.items()}
        waited, z_loss = means.pop("data_wait"), means.pop("z_loss")
        metrics = {
            **means,
            **({"z_loss": z_loss} if z_loss else {}),
            "learning_rate": launched.step.learning_rate,
            "grad_norm": grad_norm[0],  # of the global batch: the same on all ranks
            "tokens": launched.step.tokens,
            "batch_tokens": launched.step.batch_tokens,
            "tokens_per_second": launched.step.batch_tokens / seconds,
            "data_wait": waited / seconds,
            "memory_bytes": int(max(memory)),
        }
        return metrics, any(stop)


def gather_metrics(
    accelerator: Accelerator, step: Step, results: dict[str, Tensor], waited: float, stop: bool
) -> LaunchedStep:
    """Gathers the metrics of a step without waiting for the device. Collective.

    Args:
        results: scalars on the device, keyed by name, as `training_step` returns them.
        waited: seconds that this rank waited for data.
        stop: whether this rank is asked to stop.
    """
    device = accelerator.device
    on_host = {"data_wait": waited, "memory_bytes": peak_memory(device), "stop": stop}
    host = torch.tensor(list(on_host.values()), dtype=torch.float32, pin_memory=device.type == "cuda")
    scalars = torch.stack([result.reshape(()) for result in results.values()]).float()
    mine = torch.cat((scalars, host.to(device, non_blocking=True)))
    names = [*results, *on_host]
    gathered, done = accelerator.gather(mine).view(-1, len(names)), None
    if device.type == "cuda":
        gathered = torch.empty(gathered.shape, pin_memory=True).copy_(gathered, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
    return LaunchedStep(step, dict(zip(names, gathered.cpu().unbind(dim=1), strict=True)), done)


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """Returns the device's peak FLOP/s at a precision; None for an unknown device or precision, never a guess."""
    name = next((name for name in _PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)), None)
    if name is None or mixed_precision not in ("bf16", "fp16"):
        return None
    return _PEAK_FLOPS[name]


def read_gpu(device: torch.device) -> dict[str, float]:
    """Returns utilization (%), temperature (°C) and power (W) of an NVIDIA GPU, as far as the driver reports them.

    torch needs nvidia-ml-py for that.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    readings = {
        "gpu_utilization": lambda: float(torch.cuda.utilization(device)),
        "gpu_temperature": lambda: float(torch.cuda.temperature(device)),
        "gpu_power": lambda: torch.cuda.power_draw(device) / 1000,
    }
    found = {}
    for name, read in readings.items():
        with contextlib.suppress(Exception):  # each driver, and a missing library, has errors of its own
            found[name] = read()
    return found

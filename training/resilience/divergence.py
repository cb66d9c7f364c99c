"""Divergence: losses and gradients that are not finite, or spikes; how a step is checked, and where it went wrong."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from modeling import GPTModel
from training.engine.batches import Batch, on_device
from training.settings.schema import DivergenceSettings


class Diverged(Exception):
    """A step that the run rolls back for.

    Attributes:
        problem: what happened, and in which step.
        batch: its sequences, as the positions of the first and of the one after the last.
    """

    def __init__(self, problem: str, batch: tuple[int, int]) -> None:
        super().__init__(problem)
        self.problem, self.batch = problem, batch


@dataclass(frozen=True)
class Divergence:
    """A problem of a step; `finite` tells whether the weights were updated."""

    problem: str
    finite: bool


def check_step(
    loss: float, grad_norm: float, recent: list[tuple[float, float]], settings: DivergenceSettings
) -> Divergence | None:
    """The divergence of a step, None for a good step.

    A spike is a loss or a gradient norm more than `spike_zscore` standard deviations above the mean of the last
    `spike_window` steps.

    Args:
        recent: losses and gradient norms of the steps before.
    """
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            return Divergence(f"the {name} is {value}", finite=False)
    if settings.spike_zscore and len(recent) >= settings.spike_window:
        losses, norms = zip(*recent, strict=True)
        for name, value, before in (("loss", loss, losses), ("gradient norm", grad_norm, norms)):
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if deviation and value > mean + settings.spike_zscore * deviation:
                return Divergence(
                    f"the {name} is {value:.4g}, {(value - mean) / deviation:.1f} standard deviations above the mean "
                    f"{mean:.4g} of the last {len(before)} steps",
                    finite=True,
                )
    return None


def is_skipped(skipped: list[tuple[int, int]], first: int, stop: int) -> bool:
    """Whether any of the sequences from `first` to before `stop` are in a skipped batch."""
    return any(first < end and begin < stop for begin, end in skipped)


def locate_divergence(accelerator: Accelerator, model: GPTModel, micro_batches: list[Batch]) -> str:
    """The layer, and the rank if there are several, where a batch goes wrong: the batch is run again. Collective.

    Args:
        micro_batches: this rank's part of the batch.
    """
    mine = _first_nonfinite(model, micro_batches, accelerator.device)
    if mine is None and accelerator.distributed_type != "FSDP":
        mine = _largest_gradient(model, micro_batches, accelerator.device)
    found: list[tuple[int, str, bool]] = [
        (rank, *one) for rank, one in enumerate(gather_object([mine or ("no layer stands out", False)]))
    ]
    rank, where, _ = next((one for one in found if one[2]), found[0])
    return where + (f" on rank {rank}" if accelerator.num_processes > 1 else "")


@torch.no_grad()
def _first_nonfinite(model: GPTModel, micro_batches: list[Batch], device: torch.device) -> tuple[str, bool] | None:
    """The first module whose result is not finite, the innermost of several."""
    found: list[str] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(result, Tensor) and not result.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in model.named_modules() if name]
    try:
        for batch in micro_batches:  # all of them, also after a find: other ranks may wait for this one
            with torch.compiler.set_stance("force_eager"):  # hooks would make compiled blocks compile again
                model(**on_device(batch, device), use_cache=False, skip_logits=True)
    finally:
        for hook in hooks:
            hook.remove()
    return (f"the first result that is not finite is that of {found[0]}", True) if found else None


def _largest_gradient(model: GPTModel, micro_batches: list[Batch], device: torch.device) -> tuple[str, bool]:
    """The parameter whose gradient is not finite, or else the one with the largest gradient."""
    parameters = dict(model.named_parameters())
    norms = dict.fromkeys(parameters, 0.0)
    for batch in micro_batches:
        # Not backward(): the hooks on the parameters belong to training.
        loss = model(**on_device(batch, device), use_cache=False, skip_logits=True).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            norm = gradient.float().norm().item()
            if not math.isfinite(norm):
                return f"all results are finite, the gradient of {name} is not", True
            norms[name] = max(norms[name], norm)
    largest = max(norms, key=lambda name: norms[name])
    return f"the largest gradient is that of {largest}, of norm {norms[largest]:.4g}", False

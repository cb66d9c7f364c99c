"""Losses and gradients that are not numbers, and those that leap: found, passed over, explained."""

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
    """A step that the run is to go back for.

    Attributes:
        what: happened, and in which step.
        batch: its sequences, as the positions of the first and of the one after the last.
    """

    def __init__(self, what: str, batch: tuple[int, int]) -> None:
        super().__init__(what)
        self.what, self.batch = what, batch


@dataclass(frozen=True)
class Judgement:
    """What is wrong with a step.

    Attributes:
        what: in words.
        finite: whether the weights were updated.
    """

    what: str
    finite: bool


def judge(
    loss: float, grad_norm: float, recent: list[tuple[float, float]], settings: DivergenceSettings
) -> Judgement | None:
    """Whether a step diverged: None for one that did not.

    A leap is a loss, or a norm of the gradient, more than `spike_zscore` standard deviations above the mean of the last
    `spike_window` steps.

    Args:
        recent: losses and norms of the steps before.
    """
    for name, value in (("loss", loss), ("norm of the gradient", grad_norm)):
        if not math.isfinite(value):
            return Judgement(f"the {name} is {value}", finite=False)
    if settings.spike_zscore and len(recent) >= settings.spike_window:
        losses, norms = zip(*recent, strict=True)
        for name, value, before in (("loss", loss, losses), ("norm of the gradient", grad_norm, norms)):
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if deviation and value > mean + settings.spike_zscore * deviation:
                return Judgement(
                    f"the {name} is {value:.4g}, {(value - mean) / deviation:.1f} standard deviations above the mean "
                    f"{mean:.4g} of the last {len(before)} steps",
                    finite=True,
                )
    return None


def is_skipped(skipped: list[tuple[int, int]], first: int, stop: int) -> bool:
    """Whether any of the sequences from `first` to before `stop` are to be passed over."""
    return any(first < end and begin < stop for begin, end in skipped)


def diagnosis(accelerator: Accelerator, model: GPTModel, micro_batches: list[Batch]) -> str:
    """Where a batch goes wrong, found by going through it again: the process and the layer.

    Called by all processes together, each with its share of the batch.
    """
    mine = _first_nonfinite(model, micro_batches, accelerator.device)
    if mine is None and accelerator.distributed_type != "FSDP":
        mine = _largest_gradient(model, micro_batches, accelerator.device)
    found: list[tuple[int, str, bool]] = [
        (rank, *one) for rank, one in enumerate(gather_object([mine or ("no layer stands out", False)]))
    ]
    rank, where, _ = next((one for one in found if one[2]), found[0])
    process = f" on process {rank}" if accelerator.num_processes > 1 else ""
    return where + process


@torch.no_grad()
def _first_nonfinite(model: GPTModel, micro_batches: list[Batch], device: torch.device) -> tuple[str, bool] | None:
    """The first module whose result is not finite, the innermost of several."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(result, Tensor) and not result.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        for batch in micro_batches:  # all of them: other processes may wait for this one
            with torch.compiler.set_stance("force_eager"):  # a compiled block would be compiled anew with its hooks
                model(**on_device(batch, device), use_cache=False, skip_logits=True)
    finally:
        for hook in hooks:
            hook.remove()
    return (f"the first result that is not finite is that of {found[0]}", True) if found else None


def _largest_gradient(model: GPTModel, micro_batches: list[Batch], device: torch.device) -> tuple[str, bool]:
    """The parameter whose gradient is not finite, or else the largest."""
    parameters = dict(model.named_parameters())
    norms = dict.fromkeys(parameters, 0.0)
    for batch in micro_batches:
        # Not backward(): the hooks of the parameters belong to training.
        loss = model(**on_device(batch, device), use_cache=False, skip_logits=True).loss
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            norm = gradient.float().norm().item()
            if not math.isfinite(norm):
                return f"all results are finite, the gradient of {name} is not", True
            norms[name] = max(norms[name], norm)
    largest = max(norms, key=lambda name: norms[name])
    return f"the largest gradient is that of {largest}, of norm {norms[largest]:.4g}", False

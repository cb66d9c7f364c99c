"""Optimizer of a run: AdamW as in GPT-3, optionally with Muon."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from training.engine.muon import Muon
from training.settings.schema import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings, mixed_precision: str = "no") -> Optimizer:
    """Creates the optimizer for all parameters of `model`.

    AdamW as in GPT-3, appendix B: decoupled decay (arXiv:1711.05101) of matrices and embeddings, none of biases and
    norms. With `muon`, Muon updates the matrices of the blocks, in bf16 if that is the run's `mixed_precision`. Each
    group has its peak learning rate in `initial_lr`, and in `state_keys` the names of its parameters' state. Raises
    `TypeError` for an optimizer that would put a gradient that is not finite into the weights.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {}
    if settings.optim == "muon":
        matrices = {name: p for name, p in parameters.items() if ".h." in name and p.dim() == 2}
    rest = [p for name, p in parameters.items() if name not in matrices]
    optimizers = [_muon(matrices, settings, mixed_precision)] if matrices else []
    optimizers.append(_adamw(rest, settings))
    for one in optimizers:
        if not getattr(one, "_step_supports_amp_scaling", False):
            raise TypeError(f"{type(one).__name__} ignores found_inf: it would take any gradient (fused=True?)")
    optimizer = optimizers[0] if len(optimizers) == 1 else CombinedOptimizer(*optimizers)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def decay_groups(parameters: list[nn.Parameter], weight_decay: float, **options: Any) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and embeddings with weight decay, biases and norms without."""
    decayed, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay, **options},
        {"params": others, "weight_decay": 0.0, **options},
    ]


def _adamw(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    return AdamW(
        decay_groups(parameters, settings.weight_decay, state_keys=("step", "exp_avg", "exp_avg_sq")),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )


def _muon(parameters: dict[str, nn.Parameter], settings: OptimizerSettings, mixed_precision: str) -> Optimizer:
    """Muon of the matrices in `parameters`, by name. `c_attn` holds three: those of queries, keys and values."""
    attention = [p for name, p in parameters.items() if name.endswith(".c_attn.weight")]
    others = [p for name, p in parameters.items() if not name.endswith(".c_attn.weight")]
    groups = [{"params": attention, "parts": 3}, {"params": others, "parts": 1}]
    return Muon(
        [{**group, "state_keys": ("momentum_buffer",)} for group in groups],
        dtype=torch.bfloat16 if mixed_precision == "bf16" else torch.float32,
        lr=settings.muon_learning_rate or settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.muon_momentum,
    )


def describe(optimizer: Optimizer) -> str:
    """Describes the optimizers, their peak learning rates, and which parameters have weight decay."""
    rates = {"Muon" if "momentum" in g else "fused AdamW": g["initial_lr"] for g in optimizer.param_groups}
    counts = []
    for decayed in (True, False):
        groups = [group["params"] for group in optimizer.param_groups if (group["weight_decay"] > 0) == decayed]
        tensors = [p for group in groups for p in group]
        counts.append(f"{len(tensors)} tensors with {sum(p.numel() for p in tensors):,} parameters")
    names = [f"{name} at {rate:g}" for name, rate in rates.items()]
    return f"{' and '.join(names)}; {counts[0]} decayed, {counts[1]} not"


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Sets the learning rate of each group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


def share_work(optimizer: Optimizer, shared: bool) -> None:
    """Sets whether processes share Muon's work, which makes a step collective."""
    for group in optimizer.param_groups:
        if "shared" in group:
            group["shared"] = shared


class CombinedOptimizer(Optimizer):
    """Combines several optimizers into one, with all their groups and a common state."""

    _step_supports_amp_scaling = True  # as all of them do
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers: list[tuple[Any, int]] = [(one, len(one.param_groups)) for one in optimizers]
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as its own optimizer made it."""
        self.param_groups.append(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Steps each optimizer, with the present groups and state, which loading may have replaced. Takes no closure
        (`ValueError`)."""
        if closure is not None:
            raise ValueError("several optimizers take no closure")
        first = 0
        for optimizer, groups in self.optimizers:
            optimizer.param_groups, optimizer.state = self.param_groups[first : first + groups], self.state
            optimizer.grad_scale, optimizer.found_inf = self.grad_scale, self.found_inf
            optimizer.step()
            first += groups

"""AdamW as GPT-3 was trained with, and Muon for the matrices beside it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from training.engine.muon import Muon
from training.settings.schema import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """An optimizer of all parameters of `model`; each group has its peak learning rate in `initial_lr`, and in
    `state_keys` the names of what it keeps for a parameter that has been updated.

    AdamW as in GPT-3, appendix B: decoupled decay (arXiv:1711.05101) of matrices and embeddings, none of biases and
    norms. With `muon`, the matrices of the blocks are Muon's, its updates scaled to the size of AdamW's, so that
    learning rate and decay carry over.

    Raises:
        TypeError: for an optimizer that would put a gradient that is not finite into the weights.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {
        name for name, p in parameters.items() if settings.optimizer == "muon" and ".h." in name and p.dim() == 2
    }
    rest = [p for name, p in parameters.items() if name not in matrices]
    adamw = AdamW(
        [
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )
    for group in adamw.param_groups:
        group["state_keys"] = ("step", "exp_avg", "exp_avg_sq")
    optimizers: list[Optimizer] = [adamw]
    if matrices:
        muon = Muon(
            [parameters[name] for name in parameters if name in matrices],
            lr=settings.muon_learning_rate or settings.learning_rate,
            weight_decay=settings.weight_decay,
            momentum=settings.muon_momentum,
        )
        muon.param_groups[0]["state_keys"] = ("momentum_buffer",)
        optimizers.insert(0, muon)
    for one in optimizers:
        if not getattr(one, "_step_supports_amp_scaling", False):
            raise TypeError(f"{type(one).__name__} does not act on found_inf: it would take any gradient (fused=True?)")
    optimizer = CombinedOptimizer(*optimizers) if matrices else adamw
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


class CombinedOptimizer(Optimizer):
    """Several optimizers as one: their groups in a row, and one state that all of them share."""

    _step_supports_amp_scaling = True  # as all of them do
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = [(optimizer, len(optimizer.param_groups)) for optimizer in optimizers]
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take a group as its own optimizer has made it."""
        self.param_groups.append(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of each, with the groups and the state as they are now: loading replaces them. No closures
        (`ValueError`)."""
        if closure is not None:
            raise ValueError("several optimizers take no closure")
        first = 0
        for optimizer, groups in self.optimizers:
            optimizer.param_groups, optimizer.state = self.param_groups[first : first + groups], self.state
            optimizer.grad_scale, optimizer.found_inf = self.grad_scale, self.found_inf
            optimizer.step()
            first += groups

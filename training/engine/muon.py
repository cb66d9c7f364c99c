"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices that may be sharded."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Optimizer):
    """Momentum with an orthogonalized update of the size of AdamW's (arXiv:2502.16982, section 2.2).

    If `found_inf`, which training sets on the device, is 1, a step changes neither weights nor momentum; the host does
    not wait for it. A sharded matrix is gathered once a step, in bfloat16.

    Args:
        params: groups of matrices `[A, B]`.
        lr: the learning rate; the root mean square of an update is about 0.2 of it.
        weight_decay: decoupled, as in AdamW.
        momentum: of the gradients' running mean, with Nesterov's look ahead.
    """

    _step_supports_amp_scaling = True  # torch's name for an optimizer that acts on found_inf
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates each matrix that has a gradient.

        Raises:
            ValueError: for a closure, and for gradients that are still multiplied by a loss scale.
        """
        if closure is not None or self.grad_scale is not None:
            raise ValueError("Muon takes no closure, and no scaled gradients: clip them first, which unscales them")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["weight_decay"], group["momentum"])

    def _update(
        self, parameter: nn.Parameter, gradient: Tensor, lr: float, weight_decay: float, momentum: float
    ) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        kept: Tensor | float = 1.0
        if self.found_inf is not None:
            kept = 1.0 - self.found_inf
            gradient = torch.where(self.found_inf > 0, buffer, gradient)  # then the mean stays as it is
        buffer.lerp_(gradient, 1 - momentum)
        update = orthogonalize_sharded(gradient.lerp(buffer, momentum).bfloat16())
        parameter.mul_(1 - kept * (lr * weight_decay))
        parameter.sub_(update.to(parameter.dtype) * (kept * (lr * 0.2 * math.sqrt(max(parameter.shape)))))


def orthogonalize_sharded(matrix: Tensor) -> Tensor:
    """`orthogonalize` for a matrix that may be sharded: one all-gather; each rank computes all of it. Collective."""
    if not isinstance(matrix, DTensor):
        return orthogonalize(matrix)
    result = orthogonalize(matrix.full_tensor())
    return distribute_tensor(result, matrix.device_mesh, matrix.placements, src_data_rank=None)


def orthogonalize(matrix: Tensor) -> Tensor:
    """A matrix `[A, B]` with singular values near 1, by Newton-Schulz iterations of fifth order in bfloat16 (the post
    above, section "Newton-Schulz")."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x

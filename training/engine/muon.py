"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), also for sharded matrices."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MAX_ELEMENTS = 1 << 27  # of the matrices that are in memory together, gathered if they are sharded


class Muon(Optimizer):
    """Momentum with an orthogonalized update of the size of AdamW's (arXiv:2502.16982, section 2.2).

    If `found_inf`, which training sets on the device, is 1, a step changes neither weights nor momentum; the host does
    not wait for it.

    Args:
        params: groups of matrices `[in, out]`. A group's `parts` is the number of matrices `[in, out / parts]` that
            each of them holds, which are orthogonalized apart; 1 if not given. If `shared` is false, each process
            orthogonalizes all of them, without collectives.
        lr: the learning rate; the root mean square of an update is about 0.2 of it.
        weight_decay: decoupled, as in AdamW.
        momentum: of the gradients' running mean, with Nesterov's look ahead.
        dtype: of the orthogonalization.
    """

    _step_supports_amp_scaling = True  # torch's name for an optimizer that acts on found_inf
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.dtype = dtype
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1, "shared": True}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates each matrix that has a gradient. Collective. Raises `ValueError` for a closure, and for gradients
        still multiplied by a loss scale."""
        if closure is not None or self.grad_scale is not None:
            raise ValueError("Muon takes no closure, and no scaled gradients: clip them first, which unscales them")
        updated: list[tuple[nn.Parameter, dict[str, Any]]] = []
        elements = 0
        for parameter, group in [(p, owner) for owner in self.param_groups for p in owner["params"]]:
            if parameter.grad is not None:
                updated.append((parameter, group))
                elements += parameter.numel()
            if elements > _MAX_ELEMENTS:
                self._update(updated)
                updated, elements = [], 0
        self._update(updated)

    def _update(self, updated: list[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """Updates some matrices, each paired with its group."""
        parts: list[Tensor] = []
        for parameter, group in updated:
            direction = self._update_momentum(parameter, group["momentum"])
            whole = direction.full_tensor() if isinstance(direction, DTensor) else direction
            parts += whole.T.chunk(group["parts"])
        shared = all(group["shared"] for _, group in updated)
        results = iter(orthogonalize_together(parts, self.dtype, shared))
        for parameter, group in updated:
            self._apply([next(results) for _ in range(group["parts"])], parameter, group)

    def _update_momentum(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Updates the running mean; returns the direction of the update, sharded as the gradient."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"]
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, buffer, gradient)  # then the mean stays as it is
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum).to(self.dtype)

    def _apply(self, parts: list[Tensor], parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """Moves the weights against their orthogonalized `parts`, `[out / parts, in]` each."""
        update = (torch.cat(parts) if len(parts) > 1 else parts[0]).T
        if isinstance(parameter, DTensor):
            update = distribute_tensor(update, parameter.device_mesh, parameter.placements, src_data_rank=None)
        applied = torch.ones((), device=parameter.device) if self.found_inf is None else 1 - self.found_inf
        size = 0.2 * math.sqrt(max(parts[0].shape))
        parameter.mul_(1 - applied * (group["lr"] * group["weight_decay"]))
        parameter.addcmul_(update.to(parameter.dtype), applied, value=-group["lr"] * size)


def orthogonalize_together(matrices: list[Tensor], dtype: torch.dtype, shared: bool = True) -> list[Tensor]:
    """Orthogonalizes matrices of any sizes, batching those of the same shape or its transpose.

    Args:
        dtype: of the arithmetic and of the results.
        shared: each process, which has the same matrices, computes a share. Collective.
    """
    by_shape = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[min(matrix.shape), max(matrix.shape)].append(index)
    results = list(matrices)
    for (rows, _), indices in by_shape.items():
        wide = [matrices[index] if len(matrices[index]) == rows else matrices[index].T for index in indices]
        batch = torch.stack(wide).to(dtype)
        found = _in_shares(batch) if shared else orthogonalize(batch)
        for index, result in zip(indices, found, strict=False):  # the rest is padding
            results[index] = result if matrices[index].shape == result.shape else result.T
    return results


def _in_shares(batch: Tensor) -> Tensor:
    """`orthogonalize(batch)`, `[N, A, B]`, with each process computing a share; entries after the N-th are padding."""
    if not dist.is_initialized() or (processes := dist.get_world_size()) == 1:
        return orthogonalize(batch)
    share = -(-len(batch) // processes)
    padded = torch.cat((batch, batch.new_zeros(share * processes - len(batch), *batch.shape[1:])))
    results = torch.empty_like(padded)
    dist.all_gather_into_tensor(results, orthogonalize(padded.chunk(processes)[dist.get_rank()]))
    return results


def orthogonalize(batch: Tensor) -> Tensor:
    """Matrices `[N, A, B]`, A <= B, with singular values near 1, by Newton-Schulz iterations of fifth order (the post
    above, section "Newton-Schulz")."""
    norm = torch.linalg.matrix_norm(batch, keepdim=True).clamp(min=1e-7)
    if batch.dtype == torch.float32 and 2 * batch.shape[1] <= batch.shape[2]:
        return _square_polynomial(batch @ batch.mT / norm.square()) / norm @ batch
    x = batch / norm
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _square_polynomial(gram: Tensor) -> Tensor:
    """The `[N, A, A]` by which all iterations together multiply x from the left; `gram` is x x^T. Its factors are
    polynomials of `gram`: they commute, and do not have the long side of x. In bfloat16 it would diverge."""
    a, b, c = _COEFFICIENTS
    product = None
    for _ in range(_ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else product @ factor
        gram = gram @ factor @ factor
    assert product is not None
    return product

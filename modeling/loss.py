"""Cross entropy of a linear head, computed in chunks of tokens so that the full logits are never in memory."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

LossKernel = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
IGNORE_INDEX = -100
VOCAB_MULTIPLE = 128  # tensor cores are faster with aligned rows: 50257 is padded to 50304 within a call


@cache
def chunk_tokens(device: torch.device) -> int:
    """Tokens per chunk of logits: few enough for a CPU's cache, enough to keep a GPU busy."""
    if device.type == "cpu":
        return 512
    large = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 32 * 1024**3
    return 16384 if large else 4096  # 16,384 tokens of GPT-2's vocabulary in bfloat16: 1.6 GB


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    z_loss: float = 0.0,
    loss_kernel: LossKernel | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of `softmax(hidden @ weight.T)` against `labels`, `chunk_tokens` tokens at a time.

    The forward pass computes the gradients of each chunk and frees its logits: one chunk of logits in memory, and no
    recomputation in the backward pass (Liger Kernel, arXiv:2410.10989, section 3.2).

    Args:
        hidden: `[N, C]`; autocast applies to the product.
        weight: `[V, C]`, the head. V is padded to a multiple of 128 within the call; the padding has probability 0.
        labels: `[N]`, int64; `IGNORE_INDEX` is ignored.
        num_items: divides the summed loss; None for the number of labels that are not ignored.
        z_loss: weight of the squared log-normalizer of the softmax (PaLM, arXiv:2204.02311, section 5).
        loss_kernel: a compiled `nats_and_gradient`; None for the plain function.

    Returns:
        The loss in nats, a float32 scalar (NaN if all labels are ignored, as in `F.cross_entropy`), and the z-loss in
        it, which has no gradient.
    """
    if num_items is None:
        num_items = (labels != IGNORE_INDEX).sum()
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    kernel = loss_kernel or nats_and_gradient
    loss, z_part = _SummedLinearCrossEntropy.apply(hidden, weight, labels, z_loss, needs_grad, kernel)
    return loss / num_items, z_part / num_items


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each token, `[N]` float32 in nats; 0 for ignored labels, whose logits are not computed.
    Arguments as in `linear_cross_entropy`."""
    head = _padded_head(hidden, weight)
    counted = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    nats = [
        F.cross_entropy(_logits(hidden[chunk], head, len(weight)).float(), labels[chunk], reduction="none")
        for chunk in counted.split(chunk_tokens(hidden.device))
    ]
    return torch.zeros(len(labels), device=hidden.device).index_put((counted,), torch.cat(nats))


def _padded_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """Returns the head in the dtype of the product, its rows padded to a multiple of `VOCAB_MULTIPLE`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return F.pad(weight.to(dtype), (0, 0, 0, -len(weight) % VOCAB_MULTIPLE))


def _logits(hidden: Tensor, head: Tensor, vocab_size: int) -> Tensor:
    """Returns logits `[N, padded V]`, -inf for the padding."""
    logits = F.linear(hidden.to(head.dtype), head)
    logits[:, vocab_size:] = float("-inf")
    return logits


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax of logits `[N, V]` in float32 and the log of its normalizer `[N, 1]`."""
    largest = logits.amax(dim=-1, keepdim=True).float()
    if torch.compiler.is_compiling():
        shares = (logits.float() - largest).exp()
        total = shares.sum(dim=-1, keepdim=True)
        return shares / total, largest + total.log()
    # The fused kernel does not return the normalizer. The largest probability is at least 1/V, so its log is finite.
    probs = logits.softmax(dim=-1, dtype=torch.float32)
    return probs, largest - probs.amax(dim=-1, keepdim=True).log()


def nats_and_gradient(logits: Tensor, targets: Tensor, valid: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the summed cross entropy of logits `[N, V]`, the summed z-loss, and the gradient `[N, V]` of both, which
    overwrites the logits."""
    probs, log_normalizer = _softmax(logits)
    nats = ((log_normalizer - logits.gather(1, targets).float()) * valid).sum()
    # d nats / d logits = softmax - one_hot, d log_normalizer / d logits = softmax
    if z_loss:
        probs *= 1 + 2 * z_loss * log_normalizer
    if torch.compiler.is_compiling():  # fuses with the softmax; a scatter would need all of it in memory
        probs = probs - (torch.arange(probs.shape[1], device=probs.device) == targets).float()
    else:
        probs.scatter_add_(1, targets, -torch.ones_like(probs[:, :1]))
    gradient = logits.copy_(probs)
    return nats, z_loss * (log_normalizer.square() * valid).sum(), gradient


class _SummedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, needs_grad: bool, loss_kernel: LossKernel
    ) -> tuple[Tensor, Tensor]:
        vocab_size = len(weight)
        head = _padded_head(hidden, weight.detach())
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        z_part = torch.zeros_like(loss)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = None

        size = chunk_tokens(hidden.device)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk, valid = hidden[rows].to(head.dtype), (labels[rows] != IGNORE_INDEX).unsqueeze(1)
            targets = labels[rows].unsqueeze(1).where(valid, 0)
            nats, z_nats, grad_logits = loss_kernel(_logits(chunk, head, vocab_size), targets, valid, z_loss)
            loss += nats
            z_part += z_nats
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ head) * valid
                share = (grad_logits.T @ (chunk * valid))[:vocab_size]
                # Many chunks are added up: in float32, even if the weights are not (FSDP2).
                grad_weight = share.float() if grad_weight is None else grad_weight.add_(share)
        ctx.gradients = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(z_part)
        return loss + z_part, z_part

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward() was called twice; compute the loss again")
        (grad_hidden, grad_weight), ctx.gradients = ctx.gradients, None  # scaled in place below
        grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden.mul_(grad_loss), grad_weight, None, None, None, None

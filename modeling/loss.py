"""Cross entropy of a linear head, without the logits of all tokens ever being in memory at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_TOKENS = 512
VOCAB_MULTIPLE = 128  # tensor cores want aligned rows: 50257 becomes 50304, for the length of one call


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy of `softmax(hidden @ weight.T)` against `labels`, `CHUNK_TOKENS` tokens at a time.

    The gradient of a cross entropy is known as soon as its logits are. So each chunk leaves its share of the gradients
    in the forward pass and its logits are freed: one chunk of logits in memory instead of all, and nothing computed
    twice (Liger Kernel, arXiv:2410.10989, section 3.2).

    Args:
        hidden: `[N, C]`; under autocast the product is computed in autocast's precision.
        weight: `[V, C]`, the head. Padding of V to a multiple of 128 exists within this call only, with probability 0.
        labels: `[N]`, int64, `IGNORE_INDEX` where there is nothing to predict.
        num_items: divides the summed loss; None for the number of labels that are not ignored.

    Returns:
        The loss in nats, a float32 scalar; NaN if every label is ignored, as in `F.cross_entropy`.
    """
    if num_items is None:
        num_items = (labels != IGNORE_INDEX).sum()
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _SummedLinearCrossEntropy.apply(hidden, weight, labels, needs_grad) / num_items


def token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each token, `[N]` float32 in nats, 0 where the label is ignored; arguments as above.

    Logits are computed for the labels that count and for no others, `CHUNK_TOKENS` at a time.
    """
    head = _padded_head(hidden, weight)
    counted = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    nats = [
        F.cross_entropy(_logits(hidden[chunk], head, len(weight)).float(), labels[chunk], reduction="none")
        for chunk in counted.split(CHUNK_TOKENS)
    ]
    return torch.zeros(len(labels), device=hidden.device).index_put((counted,), torch.cat(nats))


def _padded_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """The head in the dtype of the product, with rows added up to a multiple of `VOCAB_MULTIPLE`."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return F.pad(weight.to(dtype), (0, 0, 0, -len(weight) % VOCAB_MULTIPLE))


def _logits(hidden: Tensor, head: Tensor, vocab_size: int) -> Tensor:
    """Logits `[N, padded V]`; those of the padding have no probability."""
    logits = F.linear(hidden.to(head.dtype), head)
    logits[:, vocab_size:] = float("-inf")
    return logits


class _SummedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, needs_grad: bool) -> Tensor:
        vocab_size = len(weight)
        head = _padded_head(hidden, weight.detach())
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None

        for start in range(0, len(hidden), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            chunk, valid = hidden[rows].to(head.dtype), (labels[rows] != IGNORE_INDEX).unsqueeze(1)
            targets = labels[rows].unsqueeze(1).where(valid, 0)
            logits = _logits(chunk, head, vocab_size)
            probs = logits.softmax(dim=-1, dtype=torch.float32)
            # The largest probability is at least 1/V: its logarithm is safe where that of a target's may underflow.
            log_normalizer = logits.amax(dim=-1, keepdim=True).float() - probs.amax(dim=-1, keepdim=True).log()
            loss += ((log_normalizer - logits.gather(1, targets).float()) * valid).sum()
            if needs_grad:
                # d loss / d logits = softmax - one_hot
                grad_logits = probs.scatter_add_(1, targets, -torch.ones_like(probs[:, :1])).to(head.dtype)
                grad_hidden[rows] = (grad_logits @ head) * valid
                grad_weight += (grad_logits.T @ (chunk * valid))[:vocab_size]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None

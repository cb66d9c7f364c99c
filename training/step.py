"""One optimizer step."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.batches import Batch, on_device


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Batch],
    learning_rate: float,
    max_grad_norm: float,
) -> dict[str, Tensor]:
    """Accumulate the gradients of one global batch, clip them and update the weights.

    Args:
        micro_batches: as many as the accelerator accumulates, of `[B, T]` each, on any device.

    Returns:
        `loss`, the mean over all tokens of the global batch, and `grad_norm`, before clipping: float32 scalars on the
        device, so that whoever reads them decides when to wait.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    losses = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            loss = model(**on_device(batch, accelerator.device), use_cache=False, skip_logits=True).loss
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return {"loss": accelerator.reduce(torch.stack(losses).mean(), "mean"), "grad_norm": grad_norm}

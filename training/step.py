"""One optimizer step."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.batches import Batch, on_device


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    max_grad_norm: float,
    z_loss: float = 0.0,
) -> dict[str, Tensor]:
    """Accumulate the gradients of one global batch, clip them and update the weights.

    Args:
        micro_batches: this process's share, `[B, T]` each, on any device. They may be more or fewer than last time.
        z_loss: weight of the squared log-normalizer in what is minimised; see `GPTModel.forward`.

    Returns:
        `loss`, the mean over this process's tokens, and `z_loss`, what was added to it; `grad_norm`, of the global
        batch, before clipping: float32 scalars on the device, so that whoever reads them decides when to wait.
    """
    accelerator.gradient_accumulation_steps = len(micro_batches)
    accelerator.step = 0  # counts the micro-batches of this step only
    losses = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            outputs = model(**on_device(batch, accelerator.device), use_cache=False, skip_logits=True, z_loss=z_loss)
            accelerator.backward(outputs.loss)
            losses.append(torch.stack((outputs.loss.detach(), outputs.z_loss)))
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    loss, z_part = torch.stack(losses).mean(dim=0)
    return {"loss": loss - z_part, "z_loss": z_part, "grad_norm": grad_norm}

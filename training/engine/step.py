"""One optimizer step."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.engine.batches import Batch, on_device


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    max_grad_norm: float,
    z_loss: float = 0.0,
) -> dict[str, Tensor]:
    """Accumulate the gradients of one global batch, clip them and update the weights.

    A loss or a gradient that is not finite, on whichever process, makes `grad_norm` so on all of them, and no update:
    that is decided on the device, and the host learns of it with the numbers. (fp16's loss scale sees to it itself.)

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
            # A loss that overflows may still have a finite gradient, which the others would take for a good one.
            accelerator.backward(outputs.loss * torch.where(outputs.loss.detach().isfinite(), 1.0, torch.nan))
            losses.append(torch.stack((outputs.loss.detach(), outputs.z_loss)))
            if accelerator.sync_gradients:
                grad_norm = _whole(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
                if accelerator.scaler is None:
                    # What torch's gradient scaler tells an optimizer, which then leaves weights and moments alone.
                    optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()
    loss, z_part = torch.stack(losses).mean(dim=0)
    return {"loss": loss - z_part, "z_loss": z_part, "grad_norm": grad_norm}


def _whole(norm: Tensor) -> Tensor:
    """The norm over all shards of a sharded model."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

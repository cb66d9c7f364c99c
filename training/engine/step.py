"""One optimizer step."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.engine.data import Batch, on_device


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    micro_batches: Sequence[Batch],
    max_grad_norm: float,
    z_loss: float = 0.0,
) -> dict[str, Tensor]:
    """Accumulates the gradients of one global batch, clips them and updates the weights. Collective.

    If a loss or a gradient is not finite on any rank, `grad_norm` is not finite on all ranks, and nothing is updated.
    The device decides that; the host sees it when it reads the metrics. (With fp16 the loss scale does it.)

    Args:
        micro_batches: this rank's part, `[B, T]` each, on any device. Their number may change between steps.
        z_loss: weight of the squared log-normalizer in what is minimised; see `GPTModel.forward`.

    Returns:
        Metrics by name: `loss`, the mean over this rank's tokens; `z_loss`, its part of the objective; `grad_norm`, of
        the global batch, before clipping. They are float32 scalars on the device: the caller decides when to wait.
    """
    accelerator.gradient_accumulation_steps = len(micro_batches)
    accelerator.step = 0  # counts the micro-batches of this step only
    losses = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            outputs = model(**on_device(batch, accelerator.device), use_cache=False, skip_logits=True, z_loss=z_loss)
            # A loss that overflows may have a finite gradient, which the other ranks could not tell from a good one.
            accelerator.backward(outputs.loss * torch.where(outputs.loss.detach().isfinite(), 1.0, torch.nan))
            losses.append(torch.stack((outputs.loss.detach(), outputs.z_loss)))
            if accelerator.sync_gradients:
                grad_norm = _full_norm(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
                if accelerator.scaler is None:
                    # As torch's gradient scaler does: with found_inf the optimizer changes no weights and no state.
                    optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
            optimizer.step()
            optimizer.zero_grad()
    loss, z_part = torch.stack(losses).mean(dim=0)
    return {"loss": loss - z_part, "z_loss": z_part, "grad_norm": grad_norm}


def _full_norm(norm: Tensor) -> Tensor:
    """The norm over all shards of a sharded model."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm

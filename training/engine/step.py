"""One optimizer step."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from training.engine.data import Batch


def training_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    micro_batches: Sequence[Batch],
    max_grad_norm: float,
) -> dict[str, Tensor]:
    """Accumulates the gradients of one global batch, clips them and updates the weights. Collective.

    If a loss or a gradient is not finite on any rank, `grad_norm` is not finite on all ranks, and nothing is updated.
    The device decides that; the host sees it when it reads the metrics. (With fp16 the loss scale does it.)

    Args:
        micro_batches: this rank's part, `[B, T]` each, on any device. Their number may change between steps.

    Returns:
        Metrics by name: `loss`, the mean over this rank's tokens; `z_loss`, its part of the objective; `grad_norm`, of
        the global batch, before clipping. They are float32 scalars on the device: the caller decides when to wait.
    """
    accelerator.gradient_accumulation_steps = len(micro_batches)
    accelerator.step = 0  # else Accelerate would count on from the last step, which may have had another number
    losses = []
    for batch in micro_batches:
        with accelerator.accumulate(model):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            outputs = model(**batch, use_cache=False)
            accelerator.backward(_nan_if_infinite(outputs.loss))
        losses.append(torch.stack((outputs.loss.detach(), outputs.z_loss)))
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # over all shards
    if accelerator.scaler is None:
        # As torch's gradient scaler does: with found_inf the optimizer changes no weights and no state.
        optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    loss, z_part = torch.stack(losses).mean(dim=0)
    return {"loss": loss - z_part, "z_loss": z_part, "grad_norm": grad_norm}


def _nan_if_infinite(loss: Tensor) -> Tensor:
    """Returns the loss, with NaN gradients if it is not finite. The gradients of an infinite loss may be finite, and
    other ranks could not tell them from good ones; NaN reaches all ranks when gradients are summed."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

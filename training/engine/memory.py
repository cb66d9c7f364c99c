"""Memory of activations: recomputation, and the largest micro-batch that fits."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from data_prep.common.command_line import UserError
from eval.common.devices import peak_memory
from modeling import GPTModel

# Selective checkpointing keeps the results that cost most to compute again.
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
_SPARE = 0.1  # of the memory: steps differ


def checkpoint_activations(model: GPTModel, selective: bool) -> None:
    """Makes the blocks recompute activations in the backward pass (arXiv:1604.06174)."""
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    model.activation_checkpointing_enable(options)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def largest_micro_batch(
    attempt: Callable[[int], None], sizes: list[int], device: torch.device, all_agree: Callable[[bool], bool]
) -> int:
    """The largest of `sizes` that fits in the memory of every rank. Collective.

    Sizes are tried in order. The memory of the next one is predicted from the two before it; the search ends when the
    prediction exceeds the memory of any rank, or an attempt fails.

    Args:
        attempt: runs a step of N sequences. If it runs out of memory, it must not leave other ranks waiting.
        sizes: in ascending order.
        all_agree: whether the argument is true on every rank.

    Raises:
        UserError: if not even the smallest size fits.
    """
    room = (1 - _SPARE) * memory_for_this_process(device)
    peaks: list[int] = []
    for size in sizes:
        done = len(peaks)
        fits = True
        if done >= 2:
            per_sequence = (peaks[-1] - peaks[-2]) / (sizes[done - 1] - sizes[done - 2])
            fits = peaks[-1] + (size - sizes[done - 1]) * per_sequence <= room
        if not all_agree(fits):
            break
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            fits = False
        if not all_agree(fits):
            break
        peaks.append(peak_memory(device))
    if not peaks:
        raise UserError(
            f"per_device_train_batch_size=auto: no memory for {sizes[0]} sequence; take a smaller model, shorter "
            f"sequences or --gradient_checkpointing full"
        )
    return sizes[len(peaks) - 1]


def memory_for_this_process(device: torch.device) -> int:
    """Bytes that this process can have: of its GPU, or its own and its part of the free memory of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    import psutil

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return peak_memory(device) + psutil.virtual_memory().available // processes

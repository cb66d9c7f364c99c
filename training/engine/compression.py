"""Compression of the gradients that data-parallel processes send each other: communication hooks of DDP."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from training.checkpointing.power_sgd import PowerSGD
from training.engine.batches import Batch, on_device
from training.settings.schema import POWER_SGD_RANK, POWER_SGD_START_STEP, DeviceSettings

Hook = Callable[[Any, GradBucket], Future[Tensor]]


def compress_gradients(
    model: DistributedDataParallel, settings: DeviceSettings, batch: Batch, device: torch.device
) -> None:
    """Makes the processes send gradients as `gradient_compression` says. Collective.

    Args:
        batch: a micro-batch of the run's size.
    """
    kind = settings.gradient_compression
    hooks: dict[str, Hook] = {"fp16": fp16_compress_hook, "bf16": bf16_compress_hook, "power_sgd": _power_sgd_hook}
    state = None
    if kind == "power_sgd":
        rank, start_step = settings.power_sgd_rank, settings.power_sgd_start_step
        state = PowerSGD(model, rank or POWER_SGD_RANK, start_step or POWER_SGD_START_STEP)
    model.register_comm_hook(state, _waiting(hooks[kind]) if device.type == "cpu" else hooks[kind])
    if state is not None:
        _settle_buckets(model, batch, device)
        state.restart(0)


def _power_sgd_hook(state: PowerSGD, bucket: GradBucket) -> Future[Tensor]:
    state.buckets[bucket.index()] = [state.indices[parameter] for parameter in bucket.parameters()]
    return powerSGD_hook(state, bucket)


def _waiting(hook: Hook) -> Hook:
    """The hook, one bucket after the other: gloo runs callbacks in a few threads of its own, and PowerSGD's wait there
    for further messages, with several buckets in all threads. (torch refuses `bf16_compress_hook` without NCCL, by its
    name; gloo sums bfloat16 as well.)"""

    def waiting(state: Any, bucket: GradBucket) -> Future[Tensor]:
        future = hook(state, bucket)
        future.wait()
        return future

    return waiting


def _settle_buckets(model: nn.Module, batch: Batch, device: torch.device) -> None:
    """Lets DDP build its buckets, by two backward passes that change nothing.

    It begins with one bucket. After the first backward pass it builds others, with the gradients in the order of their
    arrival. The errors in a checkpoint belong to those.
    """
    for _ in range(2):
        model(**on_device(batch, device), use_cache=False, skip_logits=True).loss.backward()
    model.zero_grad()

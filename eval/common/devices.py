"""Devices, processes and precision of this launch."""

import ctypes
import os
import resource
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler
from torch.distributed.fsdp import MixedPrecisionPolicy

from data_prep.common.command_line import UserError, raise_all
from eval.common.launch import configured_precision, device_problems, launch_problems, on_cpu, uses_fsdp

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def make_accelerator(
    timeout: float = 3600, kwargs_handlers: Sequence[KwargsHandler] = (), **kwargs: Any
) -> Accelerator:
    """Creates this process's Accelerator; `kwargs` go to `Accelerator`. Raises `UserError` if this machine or this
    project cannot do what the launch asks for.

    Args:
        timeout: seconds that ranks wait for each other; NCCL's 10 minutes are too short for rank 0 to hash data.
    """
    raise_all([*launch_problems(), *device_problems()], "problems with this launch")
    cpu_only = on_cpu()
    if cpu_only:
        torch.set_num_threads(num_threads())
        _keep_freed_memory()
    # `cpu=True`: several processes on a machine without GPU use gloo only if told so.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)), *kwargs_handlers]
    # The run compiles its blocks itself: Accelerate's wrapper would get into the names of weights.
    accelerator = Accelerator(cpu=cpu_only, dynamo_backend="no", kwargs_handlers=handlers, **kwargs)
    if uses_fsdp() and accelerator.distributed_type != "FSDP":
        if not accelerator.is_main_process:
            sys.exit(2)  # the first rank prints the error for all
        raise UserError(
            f"the Accelerate config asks for FSDP, Accelerate gives {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}; use accelerate_configs/ddp.yaml, or a machine with GPUs"
        )
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = _sharded_precision(accelerator.mixed_precision)
    return accelerator


def _sharded_precision(mixed_precision: str) -> MixedPrecisionPolicy:
    """FSDP2's precision: computation in `mixed_precision`, gradients summed in float32.

    Accelerate's own policy would sum gradients, and return the loss, in the precision of the computation.
    """
    if mixed_precision == "no":
        return MixedPrecisionPolicy()
    compute_dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)


def peak_memory(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes: allocated memory on a CUDA device, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def num_threads() -> int:
    """Returns OMP_NUM_THREADS, or this process's share of the cores if it is 1, as `accelerate launch` sets it by
    default. Raises `UserError` if it is not a number."""
    text = os.environ.get("OMP_NUM_THREADS", "1")
    first = text.split(",")[0].strip()  # a list has a number for each nested level
    if not first.isdecimal() or int(first) < 1:
        raise UserError(f"OMP_NUM_THREADS={text!r} is not a number of threads from 1; set one, or unset it")
    chosen = int(first)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return chosen if chosen > 1 else max(1, cores // local_processes)


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory instead of returning large blocks to the system and getting them back
    zeroed, page by page, which for the logits of a step takes as long as the arithmetic."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def chosen_precision(asked_for: str) -> str:
    """Resolves the mixed precision: `asked_for`, or for `auto` the Accelerate config's, else the fastest on this
    device."""
    if asked_for != "auto":
        return asked_for
    return configured_precision() or ("bf16" if bf16_is_fast() else "fp16" if _only_fp16_is_fast() else "no")


def bf16_is_fast() -> bool:
    """Whether this process's device is faster in bf16 than in float32."""
    if not on_cpu():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _only_fp16_is_fast() -> bool:
    """Whether this process's device is a GPU with fp16 tensor cores that only emulates bf16 (V100, T4)."""
    return not on_cpu() and torch.cuda.is_available() and (7, 0) <= torch.cuda.get_device_capability() < (8, 0)

"""Processes and devices: what a launch asked for, what it got, and the precision that suits it."""

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

from data_prep.common.command_line import UserError

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def make_accelerator(
    timeout: float = 3600, kwargs_handlers: Sequence[KwargsHandler] = (), **kwargs: Any
) -> Accelerator:
    """The Accelerator of this process; `kwargs` are passed on.

    Args:
        timeout: seconds that a process waits for the others. NCCL's own 10 minutes end a run whose first process is
            still downloading, hashing or waiting for the disk.

    Raises:
        UserError: where the launch asked for processes or devices that it did not get.
    """
    cpu_only = on_cpu()
    _check_launch(cpu_only, processes_launched())
    if cpu_only:
        torch.set_num_threads(_threads())
        _keep_freed_memory()
    # Without an accelerator, several processes join through gloo only if the script says that it means the CPU.
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)), *kwargs_handlers]
    return Accelerator(cpu=cpu_only, kwargs_handlers=handlers, **kwargs)


def processes_launched() -> int:
    """The number of processes of this launch, known before any of them has joined the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether this process is on the CPU, for want of an accelerator or because the launch file says so."""
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"


def peak_memory(device: torch.device) -> int:
    """The most memory this process has had, in bytes: allocated on a CUDA device, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _threads() -> int:
    """Threads for this process: its share of the cores, unless OMP_NUM_THREADS asks for another number than 1, which
    is what `accelerate launch` sets where nobody chose."""
    chosen = int(os.environ.get("OMP_NUM_THREADS", "1"))
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return chosen if chosen > 1 else max(1, cores // local_processes)


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed for what is allocated next.

    It gives large blocks back to the system at once and gets them anew, zeroed, page by page: for the logits of a step
    that takes as long as the arithmetic. Where there is another malloc, nothing is changed.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def _check_launch(cpu_only: bool, num_processes: int) -> None:
    # The launcher of a single process names a master address only where the launch file asked for more than one.
    asked_for_more = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if asked_for_more and not {"LOCAL_RANK", "RANK", "WORLD_SIZE"} & os.environ.keys():
        raise UserError(
            "the launch asked for several processes and got one, as happens with use_cpu: true and with MULTI_CPU; for "
            "several processes on CPUs use accelerate_configs/cpu_ddp.yaml"
        )
    of_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not cpu_only and torch.cuda.is_available() and of_this_machine > (devices := torch.cuda.device_count()):
        raise UserError(
            f"the launch asked for {of_this_machine} processes on this machine, which has {devices} GPUs; give "
            f"accelerate launch --num_processes {devices}"
        )
    # cpu_ddp.yaml hides the GPUs on purpose; a launch that does not meant to have them.
    if cpu_only and num_processes > 1 and not os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1"):
        raise UserError(
            f"the launch asked for {num_processes} processes on GPUs, and torch sees none; for several processes on "
            f"CPUs use accelerate_configs/cpu_ddp.yaml"
        )


def chosen_precision(asked_for: str) -> str:
    """The mixed precision to use: the one `asked_for`, or for `auto` that of the launch file, or if it names none bf16
    where the device is fast at it."""
    if asked_for != "auto":
        return asked_for
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return launched if launched != "no" else "bf16" if bf16_is_fast() else "no"


def fp8_is_available() -> bool:
    """Whether this process's device multiplies matrices in fp8."""
    return not on_cpu() and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def bf16_is_fast() -> bool:
    """Whether this process's device is better at bf16 than at float32."""
    if not on_cpu():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()

"""Devices, precision and processes: what the launch asked for, and what it got."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from data_prep.cli import UserError
from training.config import TrainingConfig


def make_accelerator(config: TrainingConfig, num_processes: int) -> Accelerator:
    """The Accelerator of this process.

    Raises:
        UserError: where the launch file asks for something that this machine silently does not give.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise UserError(
            "the launch file asks for DeepSpeed, whose optimizer state our checkpoints cannot hold yet; "
            "use accelerate_configs/fsdp2.yaml, which shards the same"
        )
    cpu_only = on_cpu()
    _check_launch(cpu_only, num_processes)
    if cpu_only:
        torch.set_num_threads(_threads())
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    accelerator = Accelerator(
        mixed_precision=_precision(config),
        # Without an accelerator, several processes join through gloo only if the script says that it means the CPU.
        cpu=cpu_only,
        gradient_accumulation_steps=config.accumulation_steps(num_processes),
        log_with=None if config.run.report_to == "none" else config.run.report_to,
        project_dir=str(config.run_folder),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    _check_strategy(accelerator)
    return accelerator


def on_cpu() -> bool:
    """Whether this run is on the CPU, for want of an accelerator or because the launch file says so."""
    return not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"


def describe_device(device: torch.device) -> str:
    """The device's own name, as in "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type


def _precision(config: TrainingConfig) -> str | None:
    """The precision to ask Accelerate for; None leaves it to the launch file."""
    if config.run.mixed_precision != "auto":
        return config.run.mixed_precision
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        return None
    return "bf16" if _bf16_is_fast() else "no"


def _bf16_is_fast() -> bool:
    if not on_cpu():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _threads() -> int:
    """Threads for this process: its share of the cores, unless OMP_NUM_THREADS asks for another number than 1, which
    is what `accelerate launch` sets where nobody chose."""
    chosen = int(os.environ.get("OMP_NUM_THREADS", "1"))
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return chosen if chosen > 1 else max(1, cores // local_processes)


def _check_launch(cpu_only: bool, num_processes: int) -> None:
    # The launcher of a single process names a master address only where the launch file asked for more than one.
    asked_for_more = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if asked_for_more and not {"LOCAL_RANK", "RANK", "WORLD_SIZE"} & os.environ.keys():
        raise UserError(
            "the launch asked for several processes and got one, as happens with use_cpu: true and with MULTI_CPU; for "
            "several processes on CPUs use accelerate_configs/cpu_ddp.yaml"
        )
    # cpu_ddp.yaml hides the GPUs on purpose; a launch that does not meant to have them.
    if cpu_only and num_processes > 1 and not os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1"):
        raise UserError(
            f"the launch asked for {num_processes} processes on GPUs, and torch sees none; for several processes on "
            f"CPUs use accelerate_configs/cpu_ddp.yaml"
        )


def _check_strategy(accelerator: Accelerator) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and accelerator.distributed_type != "FSDP":
        raise UserError(
            f"the launch file asks for FSDP, Accelerate gives {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}; use accelerate_configs/ddp.yaml, or a machine with GPUs"
        )

"""The precision and the strategy of distribution: what the launch asked for, and what it got."""

import os

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from data_prep.cli import UserError
from eval import launch
from eval.launch import on_cpu
from training.config import TrainingConfig


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of this process.

    Raises:
        UserError: where the launch file asks for something that this machine silently does not give.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise UserError(
            "the launch file asks for DeepSpeed, whose optimizer state our checkpoints cannot hold yet; "
            "use accelerate_configs/fsdp2.yaml, which shards the same"
        )
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    accelerator = launch.make_accelerator(
        mixed_precision=_precision(config),
        gradient_accumulation_steps=config.accumulation_steps(launch.processes_launched()),
        log_with=None if config.run.report_to == "none" else config.run.report_to,
        project_dir=str(config.run_folder),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    _check_strategy(accelerator)
    return accelerator


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


def _check_strategy(accelerator: Accelerator) -> None:
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and accelerator.distributed_type != "FSDP":
        raise UserError(
            f"the launch file asks for FSDP, Accelerate gives {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}; use accelerate_configs/ddp.yaml, or a machine with GPUs"
        )

"""The Accelerator of a run, and decisions that all ranks share."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType, broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy

from data_prep.common.command_line import UserError
from eval.common import devices
from eval.common.devices import chosen_precision
from eval.common.launch import uses_fsdp
from training.settings.config import TrainingConfig

T = TypeVar("T")


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of this process.

    Raises:
        UserError: if the Accelerate config asks for something that this machine does not have, or that this trainer
            does not work with.
    """
    if config.run.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    compression = config.devices.gradient_compression
    hook = DDPCommunicationHookType("no" if compression == "none" else compression)
    accelerator = devices.make_accelerator(
        mixed_precision=chosen_precision(config.devices.mixed_precision),
        log_with=None if config.logging.report_to == "none" else config.logging.report_to,
        project_dir=str(config.run_folder),
        timeout=config.devices.ddp_timeout,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)],
    )
    _check_strategy(accelerator)
    if accelerator.is_fsdp2:
        accelerator.state.fsdp_plugin.mixed_precision_policy = sharded_precision(accelerator.mixed_precision)
    return accelerator


def sharded_precision(mixed_precision: str) -> MixedPrecisionPolicy:
    """FSDP2's precision: computation in `mixed_precision`, gradients summed in float32.

    Accelerate's own policy would sum gradients, and return the loss, in the precision of the computation.
    """
    if mixed_precision == "no":
        return MixedPrecisionPolicy()
    compute_dtype = torch.float16 if mixed_precision == "fp16" else torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)


def decide_on_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """The result of `decide` on the first rank, on all ranks. Collective. Its `UserError` or `OSError` ends all ranks,
    and is printed once."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except (UserError, OSError) as error:
            outcome[1] = UserError(str(error))
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        if not accelerator.is_main_process:
            sys.exit(2)
        raise failure
    return result


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error is that of a rank whose connection to another rank is lost."""
    return any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
    )


def describe_device(device: torch.device) -> str:
    """The device's own name, as in "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type


def _check_strategy(accelerator: Accelerator) -> None:
    if uses_fsdp() and accelerator.distributed_type != "FSDP":
        if not accelerator.is_main_process:
            sys.exit(2)  # the first rank prints the error for all
        raise UserError(
            f"the Accelerate config asks for FSDP, Accelerate gives {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}; use accelerate_configs/ddp.yaml, or a machine with GPUs"
        )

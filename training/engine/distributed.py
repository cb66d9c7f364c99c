"""The run's Accelerator, and decisions shared by all ranks."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DDPCommunicationHookType, broadcast_object_list

from data_prep.common.command_line import UserError
from eval.common.devices import chosen_precision, make_accelerator
from training.settings.schema import TrainingConfig

T = TypeVar("T")


def accelerator_for(config: TrainingConfig) -> Accelerator:
    """Creates this process's Accelerator from the settings. Raises as `make_accelerator`."""
    if config.run.full_determinism:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    compression = config.devices.gradient_compression
    hook = DDPCommunicationHookType("no" if compression == "none" else compression)
    return make_accelerator(
        mixed_precision=chosen_precision(config.devices.mixed_precision),
        log_with=None if config.logging.report_to == "none" else config.logging.report_to,
        project_dir=str(config.run_folder),
        timeout=config.devices.ddp_timeout,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook)],
    )


def decide_on_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """Calls `decide` on the first rank and returns its result on all ranks. Collective. Its `UserError` or `OSError`
    ends all ranks and is printed once."""
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
    """Whether an error means that the connection to another rank was lost."""
    return any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
    )


def describe_device(device: torch.device) -> str:
    """The device's own name, as in "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else device.type

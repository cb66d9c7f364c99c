"""What the launch asks for: the answers of `accelerate config`, as far as the launcher passes them on."""

import contextlib
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed; use accelerate_configs/fsdp2.yaml, which shards as well",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM; use accelerate_configs/fsdp2.yaml, which shards as well",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config; leave it out, FSDP2 and DDP use all processes",
}
_WRAPPED_CLASS = "GPTBlock"
_LAUNCHER = re.compile(r"(accelerate(_cli(\.py)?)? launch|accelerate-launch|accelerate[./]commands[./]launch(\.py)?)$")


def processes_launched() -> int:
    """Returns the number of launched processes, known before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_cpu() -> bool:
    """Whether this process runs on the CPU, because the Accelerate config says so or there is no accelerator."""
    if _is_true("ACCELERATE_USE_CPU"):
        return True
    import torch

    return not torch.accelerator.is_available()


def uses_fsdp() -> bool:
    """Whether the Accelerate config asks for FSDP."""
    return _is_true("ACCELERATE_USE_FSDP")


def launch_problems() -> Iterator[str]:
    """Yields each unsupported request of this launch, with the remedy, as far as it can be told without torch."""
    yield from (f"the Accelerate config asks for {name}" for flag, name in _UNSUPPORTED.items() if _is_true(flag))
    if (steps := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        yield f"the launch asks for gradient_accumulation_steps={steps}, which follow from --batch_tokens; leave it out"
    if uses_fsdp():
        yield from _fsdp_problems()
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp8":
        yield "mixed_precision: fp8 is for nn.Linear, and GPT-2's blocks have Conv1D; use bf16"
    # For a single process, `accelerate launch` sets a master address only if the config asks for several.
    asked_for_several = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if asked_for_several and not {"LOCAL_RANK", "RANK", "WORLD_SIZE"} & os.environ.keys():
        yield (
            "the launch asked for several processes and got one, as happens with use_cpu: true and with MULTI_CPU; for "
            "several processes on CPUs use accelerate_configs/cpu_ddp.yaml"
        )


def _fsdp_problems() -> Iterator[str]:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        yield "the Accelerate config asks for FSDP's first version; say fsdp_version: 2, as fsdp2.yaml does"
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    if policy not in ("TRANSFORMER_BASED_WRAP", "NO_WRAP"):
        yield f"fsdp_auto_wrap_policy={policy} would split blocks; choose TRANSFORMER_BASED_WRAP"
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", _WRAPPED_CLASS)
    if policy == "TRANSFORMER_BASED_WRAP" and named != _WRAPPED_CLASS:
        yield f"fsdp_transformer_layer_cls_to_wrap={named}: the model has blocks named {_WRAPPED_CLASS}"
    if ignored := os.environ.get("FSDP_IGNORED_MODULES"):
        yield f"fsdp_ignored_modules={ignored}: all modules are sharded, leave it out"


def device_problems() -> Iterator[str]:
    """Yields each request of this launch that torch or this machine cannot fulfil, with the remedy."""
    import torch

    mode = os.environ.get("ACCELERATE_DYNAMO_MODE", "default")
    if (name := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        if name not in torch._dynamo.list_backends(exclude_tags=()):  # with those for debugging, as eager
            known = ", ".join(["no", "eager", *torch._dynamo.list_backends()])
            yield f"dynamo_backend={name}: torch.compile has no such backend here; choose one of {known}"
        elif mode not in ("default", *(torch._inductor.list_mode_options() if name == "inductor" else ())):
            yield f"dynamo_mode={mode} does not go with dynamo_backend={name}; choose default, or backend inductor"
    processes, local_processes = processes_launched(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # cpu_ddp.yaml hides the GPUs on purpose; without that, the Accelerate config expected GPUs. torchrun has none.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    if on_cpu():
        if processes > 1 and "ACCELERATE_MIXED_PRECISION" in os.environ and not hidden:
            yield (
                f"the launch asked for {processes} processes on GPUs, and torch sees none; for several processes on "
                f"CPUs use accelerate_configs/cpu_ddp.yaml"
            )
    elif torch.cuda.is_available() and local_processes > (gpus := torch.cuda.device_count()):
        yield (
            f"the launch asked for {local_processes} processes on this machine, which has {gpus} GPUs; give "
            f"--num_processes {gpus} to accelerate launch, or --nproc_per_node {gpus} to torchrun"
        )


def compile_options() -> dict[str, Any] | None:
    """Returns the `torch.compile` options from the Accelerate config; None if it names no backend."""
    from accelerate.utils import DynamoBackend, TorchDynamoPlugin

    plugin = TorchDynamoPlugin()
    if plugin.backend == DynamoBackend.NO:
        return None
    mode = {} if plugin.mode == "default" else {"mode": plugin.mode}
    dynamic = {"dynamic": True} if plugin.dynamic else {}
    return {"backend": plugin.backend.value.lower(), "fullgraph": plugin.fullgraph, **mode, **dynamic}


def configured_precision() -> str | None:
    """Returns the mixed precision that the launch names explicitly ("no" included), by `accelerate config` or a
    launcher option; None if it names none."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION")
    return None if precision == "no" and _is_by_default() else precision


@cache
def _is_by_default() -> bool:
    """Whether `accelerate launch` was given no precision: its default "no" looks the same as the answer "no"."""
    import psutil

    for parent in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):  # the process of another user, or one that has ended
            words = parent.cmdline()
            for number in range(1, 5):  # the launcher comes after Python and its options
                if _LAUNCHER.search(" ".join(words[:number])):
                    return _names_no_precision(words[number:])
    return False


def _names_no_precision(words: list[str]) -> bool:
    """Whether neither the words after `accelerate launch` nor the config that they choose name a precision."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_known_args(words)[0]
    if args.mixed_precision is not None:
        return False
    file = args.config_file or default_config_file
    return not os.path.isfile(file) or load_config_from_file(file).mixed_precision is None


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1", "yes", "y", "on", "t")

"""Each answer of `accelerate config`, as the launcher passes it on: it works, or it is refused with the remedy."""

import dataclasses

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import ROOT

from eval.common.launch import compile_options, configured_precision, device_problems, launch_problems

EAGER = {"backend": "eager", "fullgraph": False}
TWO_GPUS = {"distributed_type": "MULTI_GPU", "num_processes": 2, "main_process_port": 0}
# For each field of Accelerate's config and of its parts: fields beside it, and for each value what the refusal says.
WORKS, LAUNCHER = "", "the launcher's own business"
PARALLEL = "the Accelerate config asks for a parallelism_config"
ANSWERS = {
    "compute_environment": ({}, {"LOCAL_MACHINE": WORKS}),
    "distributed_type": (
        {"num_processes": 2, "main_process_port": 0},
        {
            "MULTI_GPU": WORKS,
            "DEEPSPEED": LAUNCHER,
            "TPU": LAUNCHER,
            "MULTI_CPU": "asked for several processes and got",
        },
    ),
    "mixed_precision": (
        {},
        {"no": WORKS, "bf16": WORKS, "fp16": WORKS, "fp8": "mixed_precision: fp8 is for nn.Linear"},
    ),
    "use_cpu": ({}, {True: WORKS, False: WORKS}),
    "debug": ({}, {True: WORKS, False: WORKS}),
    "num_processes": (TWO_GPUS, {2: WORKS, 8: WORKS, 9: "asked for 9 processes on this machine, which has 8 GPUs"}),
    "enable_cpu_affinity": ({}, {True: WORKS}),
    "fp8_config": ({}, {}),
    "deepspeed_config": ({}, {}),
    "fsdp_config": (TWO_GPUS | {"distributed_type": "FSDP"}, {}),
    "parallelism_config": (TWO_GPUS, {}),
    "megatron_lm_config": (
        TWO_GPUS | {"distributed_type": "MEGATRON_LM"},
        {"{megatron_lm_tp_degree: 2}": "the Accelerate config asks for Megatron-LM"},
    ),
    "mpirun_config": ({}, {}),
    "dynamo_config": ({}, {}),
    "dynamo_backend": (
        {},
        {"no": WORKS, "eager": WORKS, "inductor": WORKS, "tensorrt": "torch.compile has no such backend"},
    ),
    "dynamo_mode": (
        {"dynamo_backend": "inductor"},
        {"default": WORKS, "reduce-overhead": WORKS, "max-autotune": WORKS, "fastest": "dynamo_mode=fastest"},
    ),
    "dynamo_use_fullgraph": ({"dynamo_backend": "eager"}, {True: WORKS}),
    "dynamo_use_dynamic": ({"dynamo_backend": "eager"}, {True: WORKS}),
    "dynamo_use_regional_compilation": ({"dynamo_backend": "eager"}, {True: WORKS}),
    "fsdp_version": ({}, {2: WORKS, 1: "FSDP's first version"}),
    "fsdp_auto_wrap_policy": (
        {},
        {"TRANSFORMER_BASED_WRAP": WORKS, "NO_WRAP": WORKS, "SIZE_BASED_WRAP": "would split blocks; choose"},
    ),
    "fsdp_transformer_layer_cls_to_wrap": ({}, {"GPTBlock": WORKS, "GPT2Block": "blocks named GPTBlock"}),
    **{f"fsdp_{name}": ({}, {True: WORKS, False: WORKS}) for name in ("offload_params", "reshard_after_forward")},
    **{f"fsdp_{name}": ({}, {True: WORKS}) for name in ("activation_checkpointing", "cpu_ram_efficient_loading")},
    "fsdp_activation_checkpointing_offload": ({"fsdp_activation_checkpointing": True}, {True: WORKS}),
    "fsdp_state_dict_type": ({}, {"FULL_STATE_DICT": WORKS, "SHARDED_STATE_DICT": WORKS}),
    # Of FSDP's first version, or without effect in the second.
    **{f"fsdp_{name}": ({}, {}) for name in ("min_num_params", "sharding_strategy", "backward_prefetch")},
    **{f"fsdp_{name}": ({}, {}) for name in ("forward_prefetch", "use_orig_params", "sync_module_states")},
    "parallelism_config_tp_size": ({}, {1: PARALLEL, 2: PARALLEL}),
    "parallelism_config_dp_shard_size": ({}, {2: PARALLEL}),
}
# Where the processes run, and what TPUs need.
_PLACES = {"num_machines", "machine_rank", "gpu_ids", "main_process_ip", "main_process_port", "rdzv_backend"}
_PLACES |= {"same_network", "main_training_function", "downcast_bf16", "tpu_name", "tpu_zone", "tpu_use_cluster"}
_PLACES |= {"tpu_use_sudo", "command_file", "commands", "tpu_vm", "tpu_env"}
_PARTS = {"fsdp": "fsdp_config", "dynamo": "dynamo_config", "parallelism": "parallelism_config"}


def _part(name: str) -> str | None:
    return _PARTS.get(name.partition("_")[0]) if name not in _PARTS.values() else None


def _told(answers: dict, folder, monkeypatch) -> None:
    """Sets the environment of the first process that `accelerate launch` starts with these answers, of 8 GPUs."""
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "num_processes": 1, "num_machines": 1}
    for name, value in answers.items():
        if (part := _part(name)) is not None:
            config[part] = config.get(part, {}) | {name: value}
        else:
            config[name] = yaml.safe_load(value) if isinstance(value, str) and value.startswith("{") else value
    if config["distributed_type"] == "FSDP":
        config["fsdp_config"] = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"} | config.get(
            "fsdp_config", {}
        )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("accelerate.utils.launch.is_fp8_available", lambda: True)
    words = ["--config_file", str(folder / "config.yaml"), "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    several = args.multi_gpu or args.use_fsdp or args.use_megatron_lm
    environment = prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]
    if several:
        environment |= {"RANK": "0", "LOCAL_RANK": "0"}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(args.num_processes))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_every_question_has_its_answers_here_and_in_the_table():
    fields = {field.name for field in dataclasses.fields(ClusterConfig)}
    options = {action.dest for action in launch_command_parser()._actions if action.dest.startswith(("fsdp", "dynamo"))}
    assert fields | options - ANSWERS.keys() - _PLACES == fields
    assert not fields - ANSWERS.keys() - _PLACES
    table = (ROOT / "docs" / "training.md").read_text()
    assert not [name for name, (_, values) in ANSWERS.items() if values and f"`{name}" not in table]


CASES = [(name, value, refused) for name, (_, values) in ANSWERS.items() for value, refused in values.items()]


@pytest.mark.parametrize(("name", "value", "refused"), [case for case in CASES if case[2] != LAUNCHER], ids=str)
def test_an_answer_works_or_is_refused(name, value, refused, tmp_path, monkeypatch):
    beside, _ = ANSWERS[_part(name) or name]
    _told(beside | ANSWERS[name][0] | {name: value}, tmp_path, monkeypatch)
    problems = [*launch_problems(), *device_problems()]
    assert len(problems) == (refused != WORKS) and all(refused in problem for problem in problems)


@pytest.mark.parametrize(
    ("answers", "options"),
    [
        ({}, None),
        ({"dynamo_backend": "NO"}, None),
        ({"dynamo_backend": "EAGER"}, EAGER),
        ({"dynamo_backend": "eager", "dynamo_use_dynamic": True}, EAGER | {"dynamic": True}),
        ({"dynamo_backend": "eager", "dynamo_use_regional_compilation": True}, EAGER),
        (
            {"dynamo_backend": "inductor", "dynamo_mode": "max-autotune", "dynamo_use_fullgraph": True},
            {"backend": "inductor", "fullgraph": True, "mode": "max-autotune"},
        ),
    ],
    ids=str,
)
def test_dynamo_s_answers_are_options_of_torch_compile(answers, options, tmp_path, monkeypatch):
    _told(answers, tmp_path, monkeypatch)
    assert compile_options() == options


def test_a_precision_that_accelerate_launch_has_not_set_is_the_user_s(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert configured_precision() is None
    for precision in ("bf16", "no"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        assert configured_precision() == precision


def test_accumulation_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert list(launch_problems()) == [
        "the launch asks for gradient_accumulation_steps=4, which follow from --batch_tokens; leave it out"
    ]

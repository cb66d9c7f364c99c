"""FSDP2 as Accelerate prepares it, over two processes of a CPU: what is computed, sent, saved and resumed."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MODEL, Finished, run_command
from forks import begin, launch_planted
from plants import sharded
from safetensors import safe_open

pytestmark = pytest.mark.processes

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.fixture(scope="module")
def environment():
    """The environment of `accelerate launch --config_file accelerate_configs/fsdp2.yaml`, on a CPU."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = str(ROOT / "accelerate_configs" / "fsdp2.yaml")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "train.py"]))
    told = {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith("FSDP_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | told | {"ACCELERATE_USE_FSDP": "true", "CUDA_VISIBLE_DEVICES": "-1,-1", "PYTHONPATH": path}


@pytest.fixture(scope="module")
def found(environment, tmp_path_factory):
    """The results of the worker, by strategy, optimizer and precision."""
    file = tmp_path_factory.mktemp("sharded") / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run_command(*launcher, WORKER, file, cwd=file.parent, env=environment)
    return json.loads(file.read_text())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_losses_are_those_of_data_parallel_training(found, kind):
    for precision, within in (("no", 1e-5), ("bf16", 5e-2)):
        first, second = (found[f"{strategy} {kind} {precision}"]["losses"] for strategy in ("ddp", "fsdp2"))
        assert first[-1] < first[0] - 2
        assert second == pytest.approx(first, abs=within)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_is_added_up_is_in_float32(found, strategy, precision):
    """The loss, the gradients of several micro-batches, the costs of HellaSwag's endings."""
    one = found[f"{strategy} adamw {precision}"]
    assert one["loss"] == one["hellaswag"] == "torch.float32" and one["accumulated"] == ["torch.float32"]
    if strategy == "fsdp2":  # which has no autocast
        assert one["logits"] == ("torch.float32" if precision == "no" else "torch.bfloat16")


def test_compiled_blocks_are_sharded_as_well(found):
    """A block for training and one for evaluation, and the loss for each of both: the hooks that gather and free
    weights stay outside of the graphs."""
    one = found["fsdp2 adamw no"]
    assert one["compiled"] == pytest.approx(one["losses"], abs=1e-5)
    assert one["graphs"] <= 4


def test_processes_wait_for_each_other_as_long_as_they_are_told_to(found):
    assert {one["timeout"] for one in found.values()} == {1234}


def test_collectives_of_a_step(found):
    """Data parallel: one for all gradients, which fit into a bucket. Sharded: each unit is gathered for the forward and
    for the backward pass of each micro-batch, its gradients are scattered once, and the norm is summed once. Muon
    gathers the results of all processes once for each of two shapes, and each sharded matrix before that."""
    assert found["ddp adamw no"]["collectives"] == {"allreduce": 1}
    assert found["ddp muon no"]["collectives"] == {"allreduce": 1, "allgather_base": 2}
    assert found["ddp muon no"]["alone"] == {}  # a process that searches for its micro-batch may have run out of memory
    expected = {"allgather_base": 12, "reduce_scatter_base": 4, "all_reduce": 1}
    assert found["fsdp2 adamw no"]["collectives"] == expected
    matrices = found["fsdp2 muon no"]["matrices"]
    assert matrices == 8
    of_muon = {"all_gather_into_tensor": matrices, "allgather_base": expected["allgather_base"] + 2}
    assert found["fsdp2 muon no"]["collectives"] == expected | of_muon


def test_a_sharded_run_and_one_process_resume_each_other(environment, data_folder, swag_file, tmp_path):
    """The whole trainer: the losses of one process whoever begins; evaluations; checkpoints with one head in them."""
    words = "--optim muon --learning_rate 1e-2 --auto_resume --mixed_precision no --order sequential "
    words += "--batch_tokens 512 --per_device_train_batch_size 4 --val_tokens 2048 --eval_steps 3 --save_steps 3 "
    words += "--save_total_limit 9 --sample_every 4 --sample_tokens 4 --warmup_steps 1 --lr_scheduler_type constant "
    words += "--hellaswag_every 4 --override max_steps"
    common = ["--data", data_folder, *TINY_MODEL, "--hellaswag_data", swag_file, *words.split()]
    options = dict.fromkeys(("FSDP_ACTIVATION_CHECKPOINTING", "FSDP_CPU_RAM_EFFICIENT_LOADING"), "true")

    def train(name: str, *parts: tuple[bool, int]) -> Finished:
        for in_two, steps in parts:
            flags = [*common, "--run_name", name, "--max_steps", steps]
            if in_two:
                launch_planted(sharded, *flags, cwd=tmp_path, env=environment | options)
            else:
                begin(flags, tmp_path).finished(name)
        return Finished(tmp_path / "runs" / name, "")

    alone = train("alone", (False, 9))
    mixed = train("mixed", (True, 3), (False, 6), (True, 9))
    assert mixed.losses() == pytest.approx(alone.losses(), abs=1e-2)
    assert len(mixed.checkpoints) == 3
    for one, other in zip(alone.checkpoints, mixed.checkpoints, strict=True):
        for file in ("model.safetensors", "training_state/optimizer.safetensors"):
            with safe_open(one / file, "pt") as left, safe_open(other / file, "pt") as right:
                assert sorted(left.keys()) == sorted(right.keys())
                assert "lm_head.weight" not in right.keys()  # noqa: SIM118


def test_shapes_and_divisibility_on_many_ranks(environment, tmp_path):
    """Also where there are fewer rows than ranks."""
    worker = Path(__file__).with_name("many_ranks_worker.py")
    run_command(sys.executable, worker, "0/8", "7/8", "0/64", "63/64", cwd=tmp_path, env=environment)

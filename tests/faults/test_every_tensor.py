"""Weights and optimizer states with something missing, renamed or of another shape are refused, by name."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forks import begin
from plants import rehash
from safetensors.torch import load_file, save_file
from small_models import SMALL

from data_prep.common.command_line import UserError
from eval.common.models import load_model
from modeling import GPTConfig, GPTModel
from training.checkpointing.checkpoint import Snapshot, write_checkpoint
from training.checkpointing.store import RunState

RESUME = ["--run_name", "tiny", "--resume_from_checkpoint", "--max_steps", "30", "--override", "max_steps"]
CHANGES = {
    "missing": (lambda w: w.pop("transformer.h.1.mlp.c_fc.weight"), "transformer.h.1.mlp.c_fc.weight is missing"),
    "renamed": (
        lambda w: w.update({"transformer.h.1.attn.c_attn.wait": w.pop("transformer.h.1.attn.c_attn.weight")}),
        "transformer.h.1.attn.c_attn.weight is missing",
    ),
    "unknown": (lambda w: w.update({"transformer.h.9.ln_1.bias": torch.zeros(32)}), "transformer.h.9.ln_1.bias is un"),
    "another shape": (lambda w: w.update({"transformer.ln_f.bias": torch.zeros(31)}), "transformer.ln_f.bias"),
    "nothing": (lambda w: w.clear(), "the weights beside it have 40 bytes"),
}


def change(checkpoint: Path, name: str, act) -> None:
    tensors = load_file(checkpoint / name)
    act(tensors)
    save_file(tensors or {}, checkpoint / name, metadata={"format": "pt"})
    rehash(checkpoint, name)


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    """A run with one checkpoint, to resume from or to start from."""
    home = tmp_path / "runs" / "tiny"
    home.mkdir(parents=True)
    shutil.copy(tiny_run.folder / "config.yaml", home)
    return shutil.copytree(tiny_run.checkpoints[-1], home / "checkpoints" / tiny_run.checkpoints[-1].name)


WRITTEN = {
    "wrapped": (lambda w: w.update({f"_orig_mod.{name}": w.pop(name) for name in list(w)}), "_orig_mod.transformer"),
    "missing": CHANGES["missing"],
    "unknown": CHANGES["unknown"],
    "another shape": (CHANGES["another shape"][0], "is [31], expected [32]"),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_a_checkpoint_with_other_weights_than_its_model_is_never_complete(what, tmp_path):
    act, message = WRITTEN[what]
    model = GPTModel(GPTConfig(**SMALL))
    weights = dict(model.named_parameters())
    with torch.device("meta"):
        meta_model = GPTModel(model.config)
    snapshot = Snapshot(meta_model, weights, {}, [], RunState({}, {}, 1, step=3), {})
    assert (write_checkpoint(snapshot, tmp_path) / "COMPLETE").exists()
    act(weights)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_checkpoint(replace(snapshot, state=RunState({}, {}, 1, step=4)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("what", CHANGES)
def test_weights_are_all_accounted_for(copy, data_folder, tmp_path, what):
    act, message = CHANGES[what]
    change(copy, "model.safetensors", act)
    with pytest.raises(UserError, match="model '") as caught:
        load_model(str(copy))
    assert message in str(caught.value)
    if what != "renamed":  # one of them goes through real processes
        return
    for words in (["--model_name_or_path", copy, "--data", data_folder, "--run_name", "new"], RESUME):
        assert message in begin(words, tmp_path).ended_with(2)
        assert not (tmp_path / "runs" / "new").exists()


def several(tensors: dict) -> None:
    """One missing, one unknown, one of another shape, one of whole numbers."""
    del tensors["transformer.wte.weight/exp_avg"]
    tensors["x/exp_avg"] = torch.zeros(1)
    tensors["transformer.wpe.weight/exp_avg_sq"] = torch.zeros(2, 2)
    tensors["transformer.wpe.weight/exp_avg"] = torch.zeros(32, 32, dtype=torch.int32)


SEVERAL = [
    *("transformer.wte.weight/exp_avg is missing", "x/exp_avg is unknown"),
    "transformer.wpe.weight/exp_avg_sq is [2, 2] torch.float32, expected [32, 32] floats",
    "transformer.wpe.weight/exp_avg is [32, 32] torch.int32",
]


@pytest.mark.parametrize(("act", "messages"), [(dict.clear, ["is missing"]), (several, SEVERAL)], ids=["all", "some"])
def test_the_optimizers_state_is_all_accounted_for(copy, tmp_path, act, messages):
    change(copy, "training_state/optimizer.safetensors", act)
    text = begin(RESUME, tmp_path).ended_with(2)
    assert all(message in text for message in messages), text


@pytest.mark.parametrize("content", [{}, {"cpu": torch.zeros(3, dtype=torch.uint8)}, {"cpu": torch.zeros(5056)}])
def test_a_bad_state_of_random_numbers_is_refused(copy, tmp_path, content):
    save_file(content, copy / "training_state" / "rng_0.safetensors")
    rehash(copy, "training_state/rng_0.safetensors")
    assert "cannot be resumed from (" in begin(RESUME, tmp_path).ended_with(2)

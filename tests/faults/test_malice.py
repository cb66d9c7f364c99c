"""Files from strangers: nothing in them is run, whatever they ask for."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from forks import begin
from plants import rehash

from data_prep.common.command_line import UserError
from data_prep.sharding.manifest import Manifest
from eval.common.models import load_model
from training.checkpointing.store import find_corruption, load_state

PROGRAM = "open({file!r}, 'w').close()\nclass GPT2LMHeadModel: ...\nclass Tokenizer: ...\n"


class Bomb:
    """An object that acts as soon as it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.fixture
def trap(tmp_path) -> Path:
    """The file that code run by mistake would make."""
    file = tmp_path / "trap"
    with pytest.raises(AssertionError):  # the bomb works
        pickle.loads(pickle.dumps(Bomb(file)))
        assert not file.exists()
    file.unlink()
    return file


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run.checkpoints[-1], tmp_path / "copy")


def test_weights_that_are_a_pickle_are_refused(copy, trap, data_folder, tmp_path):
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trap)))
    with pytest.raises(UserError, match="model '"):
        load_model(str(copy))
    text = begin(["--model_name_or_path", copy, "--data", data_folder], tmp_path).ended_with(2)
    assert text.startswith("error: ") and text.count("\n") == 1, text
    assert not trap.exists()


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng_0.safetensors", "state.json"])
def test_a_state_that_is_a_pickle_is_refused(tiny_run, copy, trap, tmp_path, name):
    """Even with its hash in the sentinel."""
    (copy / "training_state" / name).write_bytes(pickle.dumps(Bomb(trap)))
    rehash(copy, f"training_state/{name}")
    assert find_corruption(copy) is None
    home = shutil.copytree(copy, tmp_path / "runs" / "tiny" / "checkpoints" / copy.name)
    shutil.copy(tiny_run.folder / "config.yaml", home.parents[1])
    words = ["--resume_from_checkpoint", home, "--run_name", "branch", "--max_steps", "30"]
    assert "error: " in begin(words, tmp_path).ended_with(2)
    assert not trap.exists() and not (tmp_path / "runs" / "branch").exists()


def test_code_beside_a_model_is_not_run(copy, trap):
    (copy / "evil.py").write_text(PROGRAM.format(file=str(trap)))
    settings = json.loads((copy / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.GPT2LMHeadModel", "AutoModelForCausalLM": "evil.GPT2LMHeadModel"}
    (copy / "config.json").write_text(json.dumps(settings))
    load_model(str(copy))
    assert not trap.exists()


@pytest.mark.parametrize("tokenizer_class", [None, "EvilTokenizer"])
def test_code_beside_a_tokenizer_is_not_run(copy, trap, tokenizer_class):
    (copy / "evil.py").write_text(PROGRAM.format(file=str(trap)))
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}}
    if tokenizer_class is not None:
        settings["tokenizer_class"] = tokenizer_class
    file.write_text(json.dumps(settings))
    try:
        load_model(str(copy))
    except UserError as error:
        assert "tokenizer" in str(error)
    assert not trap.exists()


def test_a_shard_that_is_a_pickle_is_refused(data_folder, trap, tmp_path):
    import numpy as np

    copy = shutil.copytree(data_folder, tmp_path / "copy")
    shard = next(copy.glob("*_train_*.npy"))
    np.save(shard, np.array([Bomb(trap)], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a readable shard"):
        Manifest.read(copy)
    assert not trap.exists()


def test_a_state_with_more_in_it_than_it_has_is_refused(copy):
    file = copy / "training_state" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"__class__": "os"}))
    with pytest.raises(UserError, match="not a checkpoint to resume from"):
        load_state(copy)

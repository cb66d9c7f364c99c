"""FSDP2's sharding of the model, of both optimizers and of their state, over two processes on the CPU."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command
from tiny import STEPS, batches, make_model, train
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.processes

KINDS = ("adamw", "muon")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder for each optimizer, with what two processes have made of it."""
    folder = tmp_path_factory.mktemp("sharded")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    words = [*launcher, Path(__file__).parent / "sharded_worker.py", folder, str(STEPS), *KINDS]
    run_command(*words, cwd=folder, env=os.environ | {"PYTHONPATH": path})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_training_is_that_of_one_process(sharded, kind):
    """The same losses, saved as an ordinary checkpoint from which a second model goes on bitwise."""
    folder = sharded / kind
    result = json.loads((folder / "losses.json").read_text())

    model = make_model()
    alone = train(model, optimizer=kind)
    difference = torch.tensor(result["losses"]) - alone
    # Muon's own products are in bfloat16, and differ where what is summed first does.
    assert difference.abs().max() < (1e-4 if kind == "adamw" else 2e-2)
    assert result["resumed"] == result["losses"]

    half = make_model()
    train(half, optimizer=kind, steps=STEPS // 2)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        difference = stock(ids).logits - half(ids).logits
    assert difference.abs().max() < (1e-3 if kind == "adamw" else 0.2)

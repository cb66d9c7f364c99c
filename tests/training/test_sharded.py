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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sharded_training_is_that_of_one_process(tmp_path, kind):
    """The same losses, saved as an ordinary checkpoint from which a second model goes on bitwise."""
    here = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    words = [*launcher, here / "sharded_worker.py", tmp_path, str(STEPS), kind]
    run_command(*words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path})
    result = json.loads((tmp_path / "losses.json").read_text())

    model = make_model()
    alone = train(model, optimizer=kind)
    difference = torch.tensor(result["losses"]) - alone
    # Muon's own products are in bfloat16, and differ where what is summed first does.
    assert difference.abs().max() < (1e-4 if kind == "adamw" else 2e-2)
    assert result["resumed"] == result["losses"]

    half = make_model()
    train(half, optimizer=kind, steps=STEPS // 2)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = batches(1)[0]["input_ids"]
    with torch.no_grad():
        difference = stock(ids).logits - half(ids).logits
    assert difference.abs().max() < (1e-3 if kind == "adamw" else 0.2)

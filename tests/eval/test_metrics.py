"""The metrics as `evaluate` loads them, on one and on two processes, and in the commands."""

import json
import math
import os
import subprocess
import sys

import evaluate
import pytest
import torch
from conftest import ROOT, run_command
from torch.nn import functional as F

from eval.common.models import load_model
from eval.loss import read_tokens, windows

METRICS = ROOT / "eval" / "metrics"
NATS, TOKENS, BYTES = [10.0, 2.5, 7.25], [4, 1, 5], [16, 3, 9]
COSTS, LENGTHS, LABELS = (
    [[3.0, 2.0], [1.0, 6.0], [4.0, 3.0], [2.0, 2.0]],
    [[3, 1], [1, 7], [4, 2], [1, 1]],
    [1, 1, 0, 0],
)
LM = {
    "loss": 19.75 / 10,
    "perplexity": math.exp(19.75 / 10),
    "bits_per_byte": 19.75 / math.log(2) / 28,
}
CHOICE = {"acc": 2 / 4, "acc_norm": 3 / 4}


def test_language_modeling_accumulates_over_batches():
    metric = evaluate.load(str(METRICS / "language_modeling"))
    for some in (slice(0, 1), slice(1, 3)):
        metric.add_batch(nats=NATS[some], tokens=TOKENS[some], bytes=BYTES[some])
    assert metric.compute() == pytest.approx(LM)


def test_multiple_choice_accumulates_over_batches():
    metric = evaluate.load(str(METRICS / "multiple_choice"))
    for some in (slice(0, 3), slice(3, 4)):
        metric.add_batch(nats=COSTS[some], lengths=LENGTHS[some], references=LABELS[some])
    assert metric.compute() == pytest.approx(CHOICE)


@pytest.mark.slow
def test_metrics_accumulate_over_processes(tmp_path):
    program = f"""
import json, sys, evaluate
rank = int(sys.argv[1])
mine = slice(rank, None, 2)
options = dict(num_process=2, process_id=rank, experiment_id="test", cache_dir={str(tmp_path)!r})
metric = evaluate.load({str(METRICS / "language_modeling")!r}, **options)
metric.add_batch(nats={NATS}[mine], tokens={TOKENS}[mine], bytes={BYTES}[mine])
choice = evaluate.load({str(METRICS / "multiple_choice")!r}, **options)
choice.add_batch(nats={COSTS}[mine], lengths={LENGTHS}[mine], references={LABELS}[mine])
print(json.dumps([metric.compute(), choice.compute()]))
"""
    words = [sys.executable, "-c", program]
    ranks = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True, cwd=tmp_path) for rank in (0, 1)]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in ranks)
    assert first == [pytest.approx(LM), pytest.approx(CHOICE)]
    assert second == [None, None]


def test_the_commands_need_neither_evaluate_nor_a_cache(tiny_run, data_folder, swag_file, tmp_path):
    """They print what the metrics compute, where Hugging Face's cache cannot be made."""
    (tmp_path / "file").write_text("")
    program = f"""
import sys, eval.loss, eval.hellaswag
for command, data in ((eval.loss, {str(data_folder)!r}), (eval.hellaswag, {str(swag_file)!r})):
    sys.argv = ["-", {str(tiny_run.checkpoints[-1])!r}, "--data", data]
    command.main()
print({{"evaluate", "datasets"}} & sys.modules.keys())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "file" / "cache")}
    loss, completion, _, imported = run_command(
        sys.executable, "-c", program, cwd=tmp_path, env=environment
    ).stdout.splitlines()
    metric = evaluate.load(str(METRICS / "language_modeling"), cache_dir=str(tmp_path))
    model, tokenizer = load_model(str(tiny_run.checkpoints[-1]), torch.device("cpu"))
    tokens, _ = read_tokens(data_folder, tokenizer)
    for batch in windows(tokens, model.config.n_positions, model.config.n_positions, 8):
        logits = model(batch["input_ids"]).logits.flatten(0, 1)
        nats = F.cross_entropy(logits, batch["shift_labels"].flatten(), reduction="sum").item()
        metric.add(nats=nats, tokens=int((batch["shift_labels"] != -100).sum()), bytes=0)
    scores = metric.compute()
    assert f"loss {scores['loss']:.4f} nats per token, perplexity {scores['perplexity']:.2f}" in loss
    assert completion.startswith("completion  acc_norm ") and imported == "set()"

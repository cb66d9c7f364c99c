"""The metrics as `evaluate` loads them, on one and on two processes, and in the commands."""

import importlib
import json
import math
import subprocess
import sys
import types

import evaluate
import pytest
from conftest import ROOT, run_command

from data_prep.common.command_line import UserError
from eval.common.scores import load_metric

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


@pytest.mark.parametrize("missing", ["evaluate", "datasets"])
def test_a_missing_library_gets_one_line(missing, monkeypatch):
    for name in ("evaluate", missing):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=f"{missing}.*; pip install evaluate datasets"):
        load_metric("multiple_choice")


@pytest.mark.parametrize("module", ["eval.loss", "eval.hellaswag"])
def test_the_commands_report_through_the_metrics(module, tiny_run, data_folder, swag_file, monkeypatch, capsys):
    """With a metric of fixed scores the commands print these."""
    scores, data, expected = {
        "eval.loss": ({"loss": 1.5, "perplexity": 2.5, "bits_per_byte": 3.5}, data_folder, "loss 1.5000 nats per"),
        "eval.hellaswag": ({"acc": 0.125, "acc_norm": 0.75}, swag_file, "acc_norm 0.7500 ± 0.2165, acc 0.1250"),
    }[module]
    metric = types.SimpleNamespace(add_batch=lambda **batch: None, compute=lambda: scores)
    monkeypatch.setattr(f"{module}.load_metric", lambda name: metric)
    monkeypatch.setattr("sys.argv", [module, str(tiny_run.checkpoints[-1]), "--data", str(data)])
    importlib.import_module(module).main()
    assert expected in capsys.readouterr().out


def test_libraries_of_training_stay_free_of_evaluate():
    program = "import sys, eval.loss, eval.hellaswag; print({'evaluate', 'datasets'} & sys.modules.keys())"
    assert run_command(sys.executable, "-c", program, cwd=ROOT).stdout == "set()\n"

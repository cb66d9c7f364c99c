"""Killed at any moment and started again by the same command, a run is what it would have been."""

import json
import random
import shutil
from functools import partial

import pytest
import torch
from conftest import TINY_MODEL, Finished
from forks import begin
from plants import counted, signalled
from safetensors.torch import load_file

from data_prep.sharding.manifest import Manifest

pytestmark = pytest.mark.processes

# What a step's number or position decides, and what lies between two steps: a mixture through several epochs, attention
# within documents, dropout, Muon, a ramp, evaluations, samples, checkpoints that come and go.
WORDS = """
--data_weights 3 1 --order shuffled --document_mask true --dropout 0.1 --mixed_precision no
--optim muon --learning_rate 1e-2 --muon_learning_rate 2e-2 --z_loss 1e-3 --lr_scheduler_type wsd --warmup_tokens 1000
--batch_ramp_start 1024 --batch_ramp_tokens 8192 --batch_tokens 4096 --per_device_train_batch_size 16 --max_steps 15
--val_tokens 4096 --eval_steps 2 --save_steps 3 --save_total_limit 1 --keep_every 6 --hellaswag_every 4
--sample_every 5 --sample_tokens 4 --sample_prompts def --spike_zscore 100 --spike_window 4
"""
RECIPE = [*TINY_MODEL, *WORDS.split()]


@pytest.fixture(scope="session")
def command(data_folder, other_data, swag_file):
    """The command of a run by name: the same one to start it and to start it again."""
    flags = ["--data", data_folder, other_data, "--hellaswag_data", swag_file, *RECIPE]
    return lambda name: ["--run_name", name, "--auto_resume", *flags]


@pytest.fixture(scope="session")
def undisturbed(command, tmp_path_factory):
    """The undisturbed run, and the number of calls of each kind at which a process can be killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = begin(command("whole"), folder, partial(counted, folder / "runs" / "whole", folder / "counts"))
    return run.finished("whole"), json.loads((folder / "counts").read_text())


def assert_same_run(first: Finished, second: Finished) -> None:
    """Bitwise the same losses, weights and optimizer state, and the same lines in the logs but for what is measured."""
    for run in (first, second):
        assert sorted(run.metrics()) == list(range(16))
    assert list(map(decided, sorted(first.metrics().items()))) == list(map(decided, sorted(second.metrics().items())))
    for file in ("log.txt", "samples.jsonl"):
        assert (first.folder / file).read_text() == (second.folder / file).read_text()
    for file in ("model.safetensors", "training_state/optimizer.safetensors", "training_state/rng_0.safetensors"):
        left, right = (load_file(run.checkpoints[-1] / file) for run in (first, second))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), file


def decided(line: tuple[int, dict]) -> tuple:
    """A line of metrics.jsonl without speed, memory and waiting."""
    measured = ("tokens_per_second", "data_wait", "memory_bytes")
    return line[0], tuple((name, str(value)) for name, value in line[1].items() if name not in measured)


@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 3), *(pytest.param(seed, 12, marks=pytest.mark.slow) for seed in (1, 2, 3))]
)
def test_killed_at_random_moments_it_ends_the_same(undisturbed, command, tmp_path, seed, kills):
    """During a step, a save, the removal of an older checkpoint, an evaluation, the start, the report."""
    whole, counts = undisturbed
    rng = random.Random(seed)
    folder = tmp_path / "runs" / "killed"
    while kills:
        kind = rng.choice(["file", "forward"])
        count = 1 + int(counts[kind] * rng.random() ** 2)
        run = begin(command("killed"), tmp_path, partial(signalled, kind, count, folder))
        code, text = run.ended()
        assert code in (0, -9), text
        kills -= code == -9
        if code == 0 or not kills:
            last = begin(command("killed"), tmp_path).finished("killed")
            assert_same_run(whole, last)
            assert files(last) == files(whole)  # nothing half-made is left
            shutil.rmtree(folder)


def files(run: Finished) -> set[str]:
    return {str(path.relative_to(run.folder)) for path in run.folder.rglob("*")}


def test_a_finished_run_is_left_as_it_is(undisturbed, command):
    whole: Finished = undisturbed[0]
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    text = begin(command("whole"), whole.folder.parents[1]).ended_with(0)
    assert text == "runs/whole is finished, at step 15\n"
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before


def test_a_mixture_is_accounted_for(undisturbed, data_folder, other_data):
    """Each source's share, tokens and epochs, one of them through several."""
    whole: Finished = undisturbed[0]
    metrics = whole.metrics()
    total = metrics[14]["tokens"]
    for folder, share in ((data_folder, 0.75), (other_data, 0.25)):
        read = metrics[15]["data"][str(folder)]
        assert (read["share"], read["tokens"]) == (share, pytest.approx(share * total, abs=32))
        assert read["epochs"] == pytest.approx(read["tokens"] / Manifest.read(folder).tokens("train"))
        line = f"{folder}: {share:.1%}, {read['tokens']:,} tokens, {read['epochs']:.2f} epochs"
        assert line in whole.stdout
    assert metrics[15]["data"][str(other_data)]["epochs"] > 1

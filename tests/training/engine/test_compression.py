"""Compressed gradients, over two processes of a CPU: what is sent, what is left for later, and how a run resumes."""

import json
import os
import pickle
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Finished, run_command, torchrun
from forks import begin
from plants import die_after, in_step

pytestmark = pytest.mark.processes

STEPS = 12
PATHS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of the worker, by kind of compression."""
    file = tmp_path_factory.mktemp("compression") / "found.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    worker = Path(__file__).with_name("compression_worker.py")
    run_command(*launcher, worker, file, cwd=file.parent, env=os.environ | PATHS)
    return json.loads(file.read_text())


@pytest.mark.parametrize(("kind", "digits"), [("fp16", 11), ("bf16", 8)])
def test_halves_round_gradients_once_for_each_process_and_once_for_the_sum(found, kind, digits):
    assert 0 < found[kind] < 3 * 2.0**-digits


@pytest.mark.parametrize("rank", [1, 4])
def test_power_sgd_sends_matrices_of_low_rank_and_later_what_they_leave_out(found, rank):
    """The error feedback of arXiv:1905.13727: all that was sent and what is left make up the gradients."""
    one = found[f"power_sgd {rank}"]
    assert one["buckets"] > 1 and one["ranks"] == [rank]
    assert one["before"] == 0 and one["differs"] > 0.5
    assert one["sent and left"] < 1e-5


@pytest.mark.parametrize("rank", [1, 4])  # orthogonalized by different means
def test_a_step_that_is_not_finite_leaves_no_trace(found, rank):
    one = found[f"nan {rank}"]
    assert not one["finite"] and one["kept"]
    losses = np.array(one["losses"])
    assert np.isfinite(losses).tolist() == [True] * 5 + [False] + [True] * 2
    assert losses[7] < losses[6] < losses[4] < losses[0]


def test_a_restored_state_sends_the_same_bits(found):
    """And on another number of processes the same but for rounding; without its errors it does not."""
    restored = found["restored"]
    assert restored["same"]["equal"] and restored["other"]["differs"] < 1e-5 and restored["none"]["differs"] > 0.1
    assert [restored[name]["iteration"] for name in ("same", "other", "none")] == [5, 5, 5]
    assert restored["another order"].startswith("PowerSGD's errors are of gradients in another order; resume with")


def test_torch_has_no_batched_power_sgd_that_works(found):
    """Why it is no value of gradient_compression. Once this fails, it can be one."""
    assert found["batched"] == "AssertionError()"


@pytest.fixture(scope="module")
def flags(short_steps):
    words = "--max_steps 12 --save_steps 3 --save_total_limit 9 --learning_rate 1e-2 --auto_resume "
    words += "--gradient_compression power_sgd --power_sgd_start_step 4 --run_name run"
    return [*short_steps, "--per_device_train_batch_size", "4", *words.split()]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return Finished(folder / "runs" / "run", torchrun(2, *flags, cwd=folder).stdout)


def test_a_killed_run_continues_bitwise(flags, whole, tmp_path):
    """The losses, and all that is saved: weights, optimizer state, errors of both processes."""
    killed = partial(in_step, 7, 0, partial(die_after, tmp_path / "runs" / "run" / "checkpoints" / "step_00000006"))
    env = os.environ | PATHS | {"PLANT": pickle.dumps(killed).hex()}
    torchrun(2, *flags, cwd=tmp_path, script="tests/planted_train.py", env=env, exit_code=None)
    done = torchrun(2, *flags, cwd=tmp_path)
    assert "from step 6" in done.stdout
    run = Finished(tmp_path / "runs" / "run", done.stdout)
    assert run.losses() == whole.losses() and whole.losses()[-1] < whole.losses()[0] - 0.5
    last = [r.checkpoints[-1] for r in (run, whole)]
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")) for folder in last]
    assert names[0] == names[1] and "training_state/power_sgd_1.safetensors" in names[0]
    for name in names[0]:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name


def test_four_processes_continue_what_two_began(flags, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "runs" / "run")
    for checkpoint in Finished(tmp_path / "runs" / "run", "").checkpoints[2:]:
        shutil.rmtree(checkpoint)
    done = torchrun(4, *flags, cwd=tmp_path)
    assert "from step 6 (saved by 2, now 4: same batches, losses equal up to rounding)" in done.stdout
    losses = Finished(tmp_path / "runs" / "run", done.stdout).losses()
    assert np.abs(np.array(losses) - np.array(whole.losses())).max() < 1e-3


def test_one_process_goes_on_without_compression(whole, tmp_path):
    """What is saved of it does not hinder; it is asked for, as it gives another result."""
    shutil.copytree(whole.folder, tmp_path / "runs" / "run")
    words = ["--run_name", "run", "--resume_from_checkpoint", "--max_steps", 13, "--gradient_compression", "none"]
    code, text = begin(words, tmp_path).ended()
    assert code == 2 and text.rstrip().endswith("confirm the change: --override max_steps gradient_compression")
    last = begin([*words, "--override", "max_steps", "gradient_compression"], tmp_path).finished("run")
    assert "from step 12 (saved by 2, now 1" in last.stdout and len(last.losses()) == 13
    assert not list((last.checkpoints[-1] / "training_state").glob("power_sgd_*"))


def test_preflight_measures_compressed_steps(flags, tmp_path):
    """Its checkpoint has the errors of both processes, four bytes of a parameter each."""
    text = torchrun(2, *flags, "--preflight", cwd=tmp_path).stdout
    parameters = int(re.search(r"parameters  ([\d,]+)", text)[1].replace(",", ""))
    assert float(re.search(r"checkpoints of ([\d.]+) MiB", text)[1]) * 2**20 > (12 + 2 * 4) * parameters

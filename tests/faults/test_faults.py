"""Real failures: the message to the user, the files that are left, and the run after it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, Finished
from forks import begin, launch_planted
from plants import (
    bad_batch,
    die_after,
    fail,
    in_step,
    rehash,
    run_out_of_memory,
    saves_that_fail,
    signalled,
    signalled_in_evaluation,
)
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.checkpointing.store import load_state

STEPS, LENGTH, SEQUENCES = 12, 32, 16
pytestmark = pytest.mark.processes


@pytest.fixture(scope="session")
def command(data_folder):
    """The command of a run: twelve steps of sixteen sequences in a fixed order, a checkpoint after every third."""
    words = f"--mixed_precision no --order sequential --batch_tokens {SEQUENCES * LENGTH} --max_steps {STEPS} "
    words += "--per_device_train_batch_size 8 --warmup_steps 3 --optim adamw --learning_rate 1e-2 --val_tokens 2048 "
    words += "--eval_steps 6 --save_steps 3 --sample_every 0 --run_name run --auto_resume --save_total_limit 2"
    return ["--data", str(data_folder), *TINY_MODEL, *words.split()]


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory) -> Finished:
    """The run that nothing happens to."""
    return begin(command, tmp_path_factory.mktemp("whole")).finished("run")


def killed(command, folder: Path, step: int, saved: int) -> str:
    """The output of a run that is killed in a step, once the checkpoint of an earlier one is complete."""
    plant = partial(in_step, step, 0, partial(die_after, Path(f"runs/run/checkpoints/step_{saved:08d}")))
    return begin(command, folder, plant).ended_with(-signal.SIGKILL)


@pytest.fixture(scope="session")
def half_run(command, tmp_path_factory) -> Path:
    """The folder of a run that was killed between its checkpoints of steps 6 and 9."""
    folder = tmp_path_factory.mktemp("half")
    killed(command, folder, step=8, saved=6)
    assert len(list((folder / "runs" / "run" / "checkpoints").iterdir())) == 2
    return folder / "runs" / "run"


@pytest.fixture
def half(half_run, tmp_path) -> Finished:
    """A copy of it, to change."""
    return Finished(shutil.copytree(half_run, tmp_path / "runs" / "run"), "")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of three megabytes, enough for the checkpoints of a run and no more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def assert_same(first: Finished, second: Finished) -> None:
    """Bitwise the same losses and weights; each step once."""
    assert first.losses() == second.losses()
    assert (first.folder / "log.txt").read_text() == (second.folder / "log.txt").read_text()
    left, right = (load_file(run.checkpoints[-1] / "model.safetensors") for run in (first, second))
    assert all(torch.equal(left[name], right[name]) for name in left)


def sequence(data_folder: Path, position: int) -> list[int]:
    """The tokens at a position of the sequential order, read from the first shard itself."""
    tokens = np.load(next(data_folder.glob("*_train_000001.npy")))
    return tokens[position * LENGTH :][:LENGTH].tolist()


def flip(path: Path, place: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": lambda folder: flip(folder / "training_state" / "optimizer.safetensors"),
    "a truncated file": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "a missing file": lambda folder: (folder / "training_state" / "state.json").unlink(),
    "an empty sentinel": lambda folder: (folder / "COMPLETE").write_text(""),
}


@pytest.mark.parametrize("corruption", DAMAGES)
def test_a_damaged_checkpoint_is_quarantined(half, whole, command, corruption):
    DAMAGES[corruption](half.checkpoints[-1])
    root = half.folder.parents[1]
    resumed = begin(command, root).finished("run")
    assert "step_00000006 is damaged (" in resumed.stdout and "from step 3" in resumed.stdout
    assert "and was renamed to damaged_step_00000006" in resumed.stdout
    shutil.rmtree(half.folder / "checkpoints" / "damaged_step_00000006")
    assert_same(whole, resumed)


def test_a_folder_without_the_sentinel_is_no_checkpoint(half, whole, command):
    """It is left alone, though a checkpoint has to be saved there."""
    folder = half.checkpoints[-1]
    (folder / "COMPLETE").unlink()
    before = sorted(path.name for path in folder.iterdir())
    resumed = begin(command, half.folder.parents[1], partial(saves_that_fail, 0)).finished("run")
    assert "from step 3" in resumed.stdout and "step_00000006 is in the way" in resumed.stdout
    assert sorted(path.name for path in folder.iterdir()) == before
    assert_same(whole, resumed)


def test_a_damaged_checkpoint_is_refused_by_name(half, command):
    flip(half.checkpoints[-1] / "model.safetensors")
    flags = ["--resume_from_checkpoint", half.checkpoints[-1], "--run_name", "branch"]
    text = begin(flags, half.folder.parents[1]).ended_with(2)
    assert "is damaged, or no complete checkpoint (not as written: model.safetensors)" in text
    assert half.checkpoints[-1].name == "step_00000006"


def test_a_truncated_shard_is_refused(command, data_folder, tmp_path):
    copy = shutil.copytree(data_folder, tmp_path / "copy")
    shard = next(copy.glob("*_train_000001.npy"))
    os.truncate(shard, shard.stat().st_size // 2)
    text = begin([*command, "--data", copy], tmp_path).ended_with(2)
    assert text.startswith(f"error: {shard}: not a readable shard (") and text.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_fills_up(command, whole, small_disk):
    """Each checkpoint that does not fit is tried again and given up; older ones stay; with room, the run resumes."""
    ballast, flags = small_disk / "ballast", [*command, "--output_dir", small_disk / "run"]
    text = begin(flags, small_disk.parent, partial(disk_fills_up, ballast)).ended_with(2)
    assert "No space left on device" in text and "giving up until the next checkpoint" in text, text
    assert re.search(r"error: step 12 could not be saved: .*; the last one is .*/step_00000003", text)
    complete = list((small_disk / "run" / "checkpoints").iterdir())
    assert complete and all((path / "COMPLETE").exists() for path in complete)  # and nothing half-made beside them
    text = begin(flags, small_disk.parent).ended_with(2)
    assert re.search(r"checkpoints of \S+ MiB take \S+ MiB, and .* has room for \S+ MiB; make room", text)
    ballast.unlink()
    text = begin(flags, small_disk.parent).ended_with(0)
    assert_same(whole, Finished(small_disk / "run", text))


def disk_fills_up(ballast: Path) -> None:
    """Something else takes all the room, once there is a checkpoint; nobody waits for another attempt to write."""

    def fill() -> None:
        while not (ballast.parent / "run" / "checkpoints" / "step_00000003" / "COMPLETE").exists():
            pass
        with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
            while True:
                file.write(bytes(1000))

    saves_that_fail(0)
    in_step(4, 0, fill)


def test_a_folder_that_cannot_be_written_to(command, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    text = begin([*command, "--output_dir", small_disk / "runs" / "run"], small_disk.parent).ended_with(2)
    assert text.startswith("error: [Errno 30] Read-only file system") and text.count("\n") == 1, text


def test_a_writer_that_throws_is_tried_again(command, whole, tmp_path):
    run = begin(command, tmp_path, partial(saves_that_fail, 2)).finished("run")
    assert run.stdout.count("could not be saved: RuntimeError: a bug of the writer; again in 0 s") == 2
    assert_same(whole, run)


def test_a_first_checkpoint_that_cannot_be_written_ends_the_run(command, tmp_path):
    code, text = begin(command, tmp_path, partial(saves_that_fail, 99)).ended()  # of a bug, with its traceback
    assert code == 2
    step = int(re.search("error: step ([0-9]+) could not be saved: RuntimeError: a bug .*; there is none", text)[1])
    assert step < STEPS and not (tmp_path / "runs" / "run" / "checkpoints").exists()


def test_a_device_out_of_memory_is_one_line(command, tmp_path):
    text = begin(command, tmp_path, partial(in_step, 2, 0, run_out_of_memory)).ended_with(2)
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert text.splitlines()[-1].startswith(f"error: out of memory on the device ({reason}); give a sm")


# In the first validation, in a step, while the first checkpoint is written, while a later one is, later on.
MOMENTS = [
    ("forward", 2, signal.SIGXCPU),
    ("forward", 230, signal.SIGHUP),
    ("file", 36, signal.SIGUSR1),
    ("file", 90, signal.SIGTERM),
    ("forward", 300, signal.SIGINT),
    ("forward", 900, signal.SIGUSR2),
]


@pytest.mark.parametrize(("kind", "count", "what"), MOMENTS)
def test_asked_to_stop_it_leaves_a_checkpoint(command, whole, tmp_path, kind, count, what):
    plant = partial(signalled, kind, count, tmp_path / "runs" / "run", what)
    text = begin(command, tmp_path, plant).ended_with(0)
    stopped = re.search(
        r"stopped after step (\d+) \((\w+)\); the same command with --resume_from_checkpoint continues from (\S+)", text
    )
    if (kind, count) == MOMENTS[0][:2]:
        assert stopped is None and "stopped after step 0 (SIGXCPU); this run has no checkpoint yet" in text
        return
    assert stopped is not None and 0 < int(stopped[1]) < STEPS
    assert stopped[2] == what.name and (tmp_path / stopped[3] / "COMPLETE").exists()
    assert stopped[3].endswith(f"step_{int(stopped[1]):08d}")
    assert_same(whole, begin(command, tmp_path).finished("run"))


@pytest.fixture
def evaluated(command, tmp_path) -> list[str]:
    """The command with evaluations at steps 0 and 6: 8 batches of validation, 3 of HellaSwag, 3 samples of a token."""
    item = {"activity_label": "A", "ctx": "the a", "ctx_a": "the", "ctx_b": "a", "endings": ["b", "of it"], "label": 0}
    (tmp_path / "swag.jsonl").write_text("".join(json.dumps(item) + "\n" for _ in range(40)))
    every = ["--hellaswag_every", "6", "--sample_every", "6", "--sample_tokens", "1", "--save_steps", "100"]
    return [*command, *every, "--hellaswag_data", str(tmp_path / "swag.jsonl")]


@pytest.mark.parametrize(("count", "finished"), [(11 + 3, 0), (11 + 8 + 2, 1), (11 + 11 + 2, 2)])
def test_asked_to_stop_in_an_evaluation_it_saves_and_leaves_the_rest(evaluated, whole, tmp_path, count, finished):
    """`finished` evaluations of step 6 are logged; those of step 0 were, but for the samples, which begin later."""
    text = begin(evaluated, tmp_path, partial(signalled_in_evaluation, count)).ended_with(0)
    assert "stopped after step 6 (SIGTERM)" in text, text
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step_00000006" / "COMPLETE").exists()
    assert len(re.findall("^step +6  (?:validation loss|HellaSwag)", text, re.MULTILINE)) == finished
    resumed = begin(evaluated, tmp_path).finished("run")
    assert resumed.losses() == whole.losses()


def test_any_rank_asked_to_stop_in_an_evaluation_stops_all(evaluated, tmp_path):
    plant = partial(signalled_in_evaluation, 6 + 3, 1)  # each has half of the batches
    done = launch_planted(plant, *evaluated, cwd=tmp_path)
    assert "stopped after step 6 (another process was asked to)" in done.stdout
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step_00000006" / "COMPLETE").exists()


def test_the_clock_runs_out(command, whole, tmp_path):
    text = begin([*command, "--max_minutes", "0.001"], tmp_path).ended_with(0)
    assert re.search(r"stopped after step [01] \(max_minutes=0.001\); ", text), text
    assert_same(whole, begin(command, tmp_path).finished("run"))


def test_a_second_run_in_the_folder_is_refused(command, tmp_path):
    """As long as the first is there; of one that was killed nothing is held."""
    first = begin(command, tmp_path, partial(in_step, 5, 0, wait_for_the_second))
    while not (tmp_path / "in_step_5").exists():
        assert first.process.is_alive(), first.output.read_text()
    code, text = begin(command, tmp_path).ended()
    (tmp_path / "refused").touch()
    assert (code, text) == (2, "error: runs/run is in use by another process; wait for it, or stop it\n")
    assert first.finished("run")


def wait_for_the_second() -> None:
    Path("in_step_5").touch()
    while not Path("refused").exists():
        pass


def test_one_two_one_processes(command, whole, tmp_path):
    """The same sequences, losses but for rounding."""
    killed(command, tmp_path, step=4, saved=3)
    plant = partial(in_step, 4, 1, partial(die_after, tmp_path / "runs" / "run" / "checkpoints" / "step_00000006"))
    done = launch_planted(plant, *command, cwd=tmp_path, exit_code=None)
    assert "from step 3 (saved by 1, now 2: same batches, losses equal up to rounding)" in done.stdout
    assert re.search(r"exitcode +: -9", done.stderr)
    last = begin(command, tmp_path).finished("run")
    assert "from step 6 (saved by 2, now 1" in last.stdout
    assert np.abs(np.array(last.losses()) - np.array(whole.losses())).max() < 1e-4
    assert by_step(last, "tokens") == by_step(whole, "tokens")


def by_step(run: Finished, name: str) -> list:
    return [line.get(name) for _, line in sorted(run.metrics().items())]


def test_a_batch_that_is_not_finite_is_skipped(command, data_folder, whole, tmp_path):
    """The numbers of its sequences are kept; the steps after it have their own rates and tokens."""
    plant = partial(bad_batch, sequence(data_folder, 4 * SEQUENCES + 13), float("nan"))
    run = begin(command, tmp_path, plant).finished("run")
    assert NOT_FINITE in run.stdout
    losses = run.losses()
    assert losses[4] is None and all(loss is not None for loss in losses[:4] + losses[5:])
    assert json.loads((run.checkpoints[-1] / "training_state" / "state.json").read_text())["skipped"] == [[64, 80]]
    assert losses[-1] < losses[0] - 0.5
    for name in ("learning_rate", "tokens"):
        assert by_step(run, name)[5:] == by_step(whole, name)[5:]


NOT_FINITE = "step 4: the loss is nan; the weights are unchanged, sequences 64 to 79 are skipped"


def test_what_happens_to_one_rank_is_seen_by_the_other(command, data_folder, tmp_path):
    """A batch that is not finite makes no update on either; an error ends both, with that rank's own message."""
    plant = partial(bad_batch_and_failure, sequence(data_folder, 4 * SEQUENCES + 13))
    done = launch_planted(plant, *command, cwd=tmp_path, exit_code=None)
    run = Finished(tmp_path / "runs" / "run", done.stdout)
    assert NOT_FINITE in run.stdout
    losses = run.losses()
    assert losses[4] is None and len(losses) == 8 and losses[7] < losses[0] - 0.3
    assert [path.name for path in run.checkpoints] == ["step_00000003", "step_00000006"]
    assert "rank 0 lost its connection to a peer" in done.stderr
    cause = done.stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 .*RuntimeError: the disk of this process is gone", cause, re.DOTALL)


def bad_batch_and_failure(sequence: list[int]) -> None:
    bad_batch(sequence, float("nan"))
    in_step(8, 1, fail)


@pytest.mark.parametrize(
    ("flags", "planted_in", "what"),
    [
        (["--on_nonfinite", "rollback", "--report_to", "tensorboard"], (float("nan"),), "the loss is nan"),
        (["--spike_zscore", "9", "--spike_window", "4"], (100.0, "LayerNorm", 4), "the loss is .* standard deviations"),
    ],
    ids=["nan", "spike"],
)
def test_a_rollback_skips_the_batch(command, data_folder, whole, tmp_path, flags, planted_in, what):
    """From the last checkpoint it is as if the step had no batch; also after a kill, and in the log."""
    plant = partial(bad_batch, sequence(data_folder, 7 * SEQUENCES + 3), *planted_in)
    run = begin([*command, *flags], tmp_path, plant).finished("run")
    assert re.search(rf"step 7: {what}.*rolled back to step 6, sequences 112 to 127 are skipped", run.stdout)
    metrics, losses = run.metrics(), by_step(run, "loss")
    assert metrics[7]["skipped"] == [112, 128] and "loss" not in metrics[7]
    assert sorted(metrics) == list(range(13))
    if (events := run.folder / "tensorboard").exists():
        shown = EventAccumulator(str(events)).Reload()
        assert [event.step for event in shown.Scalars("loss")] == [step for step in range(12) if step != 7]
    assert losses[:7] == whole.losses()[:7] and losses[8] != whole.losses()[8]
    assert metrics[8]["tokens"] == 9 * SEQUENCES * LENGTH

    # The one batch is never trained on: a run that is told so from the beginning is the same.
    shutil.rmtree(run.folder)
    killed([*command, *flags], tmp_path, step=7, saved=6)
    checkpoint = tmp_path / "runs" / "run" / "checkpoints" / "step_00000006"
    state = checkpoint / "training_state" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"skipped": [[112, 128]]}))
    rehash(checkpoint, "training_state/state.json")
    told = begin([*command, *flags], tmp_path).finished("run")
    assert by_step(told, "loss") == losses


def test_without_a_checkpoint_to_roll_back_to_the_run_continues(command, data_folder, tmp_path):
    plant = partial(bad_batch, sequence(data_folder, 4 * SEQUENCES), 100.0, "LayerNorm", 4)
    flags = [*command, "--spike_zscore", "9", "--spike_window", "3", "--save_steps", "6"]
    run = begin(flags, tmp_path, plant).finished("run")
    assert re.search("step 4: the loss is .* the run continues, as there is no checkpoint to roll back", run.stdout)
    assert sorted(run.metrics()) == list(range(13)) and None not in run.losses()


def test_a_run_that_cannot_be_helped_halts_with_a_diagnosis(command, data_folder, tmp_path):
    plant = partial(bad_batch, sequence(data_folder, 4 * SEQUENCES + 13), float("nan"))
    text = begin([*command, "--on_nonfinite", "halt"], tmp_path, plant).ended_with(2)
    output = text[text.index("error: ") :].splitlines()
    assert output[0] == "error: step 4: the loss is nan, and on_nonfinite='halt'"
    assert output[1] == "  layer  the first result that is not finite is that of transformer.h.1.mlp"
    assert output[2].startswith("  batch  python -m data_prep.inspect ") and output[2].endswith("--sequences 64:80")
    assert output[3] == "  saved  runs/run/checkpoints/step_00000003; --resume_from_checkpoint continues from it"
    text = begin([*command, "--max_skipped", "0"], tmp_path, plant).ended_with(2)
    assert "step 4: the loss is nan, and max_skipped=0 batches are skipped" in text


def test_a_new_lowest_validation_loss_is_saved_at_its_step(command, whole, tmp_path):
    """Between two saves: killed in the step after the next, the run has it, and continues from there."""
    flags = [*command, "--eval_steps", "2", "--save_steps", "100"]
    killed(flags, tmp_path, step=5, saved=4)
    folder = tmp_path / "runs" / "run"
    state = load_state(folder / "checkpoints" / "step_00000004")
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    losses = {int(step): float(value) for step, kind, value in lines if kind == "val"}
    assert state.best_step == 4 and losses[4] == min(losses.values())
    assert state.best_val_loss == pytest.approx(losses[4], abs=1e-4)
    continued = begin(flags, tmp_path).finished("run")
    assert continued.losses() == whole.losses()

"""Before a long run: everything once, and what the run will take."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.common.command_line import UserError
from data_prep.common.locks import LOCK_NAME
from eval.common.devices import peak_memory
from eval.common.models import from_pretrained
from eval.loss import summed_loss
from training.checkpointing.snapshot import Snapshot, take_snapshot, write_checkpoint
from training.checkpointing.storage import damage, load_state
from training.engine.distributed import agreed
from training.engine.memory import memory_for_this_process
from training.engine.optimizer import set_learning_rate
from training.engine.step import training_step
from training.loop.run import Run
from training.publishing.uploader import check_access
from training.resilience.disk_space import checkpoints_kept, gib, room_for_checkpoints
from training.settings.schema import NEWEST, TrainingConfig

_MARK = "made_by_preflight"
_TIMED_STEPS = 3
_HELLASWAG_ITEMS = 64


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Have `folder`, which is there and locked, for the length of a preflight: emptied of what a killed one has left,
    and removed at the end; both by the mark that a preflight puts into it.

    Raises:
        UserError: where something else is in it.
    """
    mark = folder / _MARK
    if not mark.is_file() and (others := sorted(set(os.listdir(folder)) - {LOCK_NAME})):
        raise UserError(f"{folder}: {others[0]} is in the way of the preflight, which did not make it; move it")
    _empty(folder)
    mark.touch()
    try:
        yield
    finally:
        if mark.is_file():
            _empty(folder)
            mark.unlink()


def remove_if_empty(*folders: Path) -> None:
    """Remove the folders that a preflight was in, as far as nothing else is in them."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK_NAME, _MARK):
            path.unlink()


def get_out_of_the_way(config: TrainingConfig) -> None:
    """Have the run write beside where it will be, on the same disk, tell nobody, and evaluate little."""
    run = config.run
    run.runs_dir, run.auto_resume, run.report_to = str(Path(run.runs_dir) / ".preflight"), False, "none"
    run.resume = None if run.resume == NEWEST else run.resume
    run.hellaswag_limit = min(run.hellaswag_limit or _HELLASWAG_ITEMS, _HELLASWAG_ITEMS)


@dataclass(frozen=True)
class Findings:
    """What going through everything once has shown.

    Attributes:
        seconds_a_step: the least of a few.
        tokens_a_step: of those steps.
        memory: the most that any process had, in bytes, and `room`, what the poorest of them can have.
        checkpoint_bytes: of one checkpoint.
        seconds_to_save: until it was on the disk.
    """

    seconds_a_step: float
    tokens_a_step: int
    memory: int
    room: int
    checkpoint_bytes: int
    seconds_to_save: float


def preflight(run: Run) -> None:
    """Go through one step, one batch of validation and of HellaSwag, and one checkpoint there and back; then say what
    the run will take.

    Raises:
        UserError: for what would end the run later.
    """
    if run.config.hub.push_to_hub:
        agreed(run.accelerator, lambda: check_access(run.config.run_folder))
    found = _go_through(run)
    text = agreed(run.accelerator, lambda: forecast(run.config, found, run.bare_model.num_parameters()))
    run.log.print(text)


def _go_through(run: Run) -> Findings:
    accelerator, config = run.accelerator, run.config
    first = run.state.position
    batch_tokens = run.batch_plan.size(first * config.sequence_length)
    set_learning_rate(run.optimizer, 0.0)
    times = []
    for _ in range(1 + _TIMED_STEPS):  # the first compiles and allocates
        started = time.perf_counter()
        micro_batches = run.prefetcher.take(first, first)
        results = training_step(
            accelerator,
            run.model,
            run.optimizer,
            micro_batches,
            config.optimizer.max_grad_norm,
            config.optimizer.z_loss,
        )
        results["loss"].item()
        times.append(time.perf_counter() - started)

    snapshot = take_snapshot(accelerator, run.model, run.optimizer, run.state, run.tokenizer_files)
    batches = run.val_data.shared_out(
        int(config.optimizer.micro_batch) * accelerator.num_processes,
        int(config.optimizer.micro_batch),
        accelerator.process_index,
        accelerator.num_processes,
    )
    summed_loss(run.bare_model, batches)
    for task in run.hellaswag:
        task.evaluate(accelerator, run.bare_model)

    seconds, size = agreed(accelerator, lambda: _there_and_back(snapshot, run.checkpoints))
    own = [float(peak_memory(accelerator.device)), -float(memory_for_this_process(accelerator.device))]
    memory, room = accelerator.gather(torch.tensor([own], device=accelerator.device)).amax(dim=0).tolist()
    return Findings(min(times[1:]), batch_tokens, int(memory), -int(room), size, seconds)


def _there_and_back(snapshot: Snapshot | None, checkpoints: Path) -> tuple[float, int]:
    """Write a checkpoint and read it again: the seconds until it was on the disk, and its bytes."""
    assert snapshot is not None, "only the main process has one"
    started = time.perf_counter()
    folder = write_checkpoint(snapshot, checkpoints)
    seconds = time.perf_counter() - started
    if wrong := damage(folder):
        raise UserError(f"{folder}: what was written does not come back ({wrong}); look at the disk")
    load_state(folder)
    from_pretrained(folder, use_safetensors=True)
    return seconds, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forecast(config: TrainingConfig, found: Findings, parameters: int) -> str:
    """What a run of these settings will take, in a few lines.

    Raises:
        UserError: where its checkpoints will not fit on the disk.
    """
    run, plan = config.run, config.batch_plan
    steps, tokens = config.max_steps, plan.tokens(config.max_steps)
    hours = tokens * found.seconds_a_step / found.tokens_a_step / 3600
    cost = (
        "" if run.price_per_hour is None else f", {hours * run.price_per_hour:,.2f} at {run.price_per_hour:g} an hour"
    )
    needed, room = room_for_checkpoints(config, found.checkpoint_bytes)
    hellaswag = "HellaSwag, " if run.hellaswag_every else ""
    hub = f", access to {config.hub.push_to_hub}" if config.hub.push_to_hub else ""
    return "\n".join(
        [
            "",
            f"preflight   all of it works: steps, a validation, {hellaswag}a checkpoint there and back{hub}",
            f"parameters  {parameters:,}",
            f"steps       {steps:,}: {tokens:,} tokens",
            f"time        {hours:,.2f} hours of training at {found.tokens_a_step / found.seconds_a_step:,.0f} "
            f"tokens/s{cost}",
            f"memory      {gib(found.memory)} of {gib(found.room)} for each process",
            f"disk        {gib(needed)} of {gib(room)} for {checkpoints_kept(config)} checkpoints of "
            f"{gib(found.checkpoint_bytes)}; one is written in {found.seconds_to_save:.1f} s",
        ]
    )

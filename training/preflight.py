"""Preflight: every part of a run once, before it starts, and an estimate of what it will take."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_prep.common.command_line import UserError
from data_prep.common.hub import Hub
from data_prep.common.locks import LOCK_NAME, locked
from eval.common.devices import peak_memory
from eval.common.launch import processes_launched
from eval.common.models import from_pretrained
from training.checkpointing.checkpoint import Snapshot, take_snapshot, write_checkpoint
from training.checkpointing.store import complete_checkpoints, find_corruption, load_state
from training.engine.distributed import decide_on_main
from training.engine.model import memory_for_this_process
from training.engine.optimizer import set_learning_rate
from training.engine.step import training_step
from training.run import EvaluationStopped, Run
from training.settings.schema import NEWEST, TrainingConfig

_TIMED_STEPS = 3
_HELLASWAG_ITEMS = 64


@contextlib.contextmanager
def preflight_folder(folder: Path) -> Iterator[None]:
    """Locks a folder for a preflight, clears what a killed one left, and removes it at the end. Raises `UserError` if
    it is somebody else's, or in use."""
    # A preflight locks its folder before anything else.
    if folder.exists() and not (folder / LOCK_NAME).is_file() and (others := sorted(os.listdir(folder))):
        raise UserError(f"{folder}: {others[0]} is in the way of the preflight, which did not make it; move it")
    try:
        with locked(folder):
            _empty(folder)
            try:
                yield
            finally:
                _empty(folder)
    finally:
        for path in (folder, folder.parent):
            with contextlib.suppress(OSError):  # something else is in it
                path.rmdir()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()


def apply_preflight_overrides(config: TrainingConfig) -> TrainingConfig:
    """Settings of the preflight: a folder next to the run's on the same disk, no tracker, small evaluations."""
    checkpoint, evaluation = config.run.resume_from_checkpoint, config.evaluation
    return config.replace(
        output_dir=str(config.run_folder.parent / ".preflight" / config.run_folder.name),
        auto_resume=False,
        report_to="none",
        resume_from_checkpoint=None if checkpoint == NEWEST else checkpoint,
        val_tokens=min(evaluation.val_tokens, config.optimizer.batch_tokens),
        hellaswag_limit=min(evaluation.hellaswag_limit or _HELLASWAG_ITEMS, _HELLASWAG_ITEMS),
        lm_eval_limit=min(evaluation.lm_eval_limit or processes_launched(), processes_launched()),
    )


@dataclass(frozen=True)
class PreflightResult:
    """Measurements of a preflight."""

    step_seconds: float  # fastest timed step
    step_tokens: int
    memory: int  # peak over all ranks, in bytes
    room: int  # smallest memory of any rank, in bytes
    checkpoint_bytes: int
    saving_seconds: float  # until the checkpoint was on the disk


def preflight(run: Run) -> None:
    """Runs a few steps, each evaluation, and a checkpoint round trip; prints an estimate. Collective. Raises
    `UserError` for a problem that would end the run later."""
    if run.config.hub.push_to_hub:
        hub = Hub(str(run.config.hub.hub_model_id), "model")
        decide_on_main(run.accelerator, hub.check_access)
    result = _measure(run)
    begin = (run.state.step, run.state.position)
    text = decide_on_main(
        run.accelerator, lambda: forecast(run.config, result, run.bare_model.num_parameters(), *begin)
    )
    run.log.print(text)


def _measure(run: Run) -> PreflightResult:
    accelerator, settings, first = run.accelerator, run.config.optimizer, run.state.position
    set_learning_rate(run.optimizer, 0.0)
    times = []
    for _ in range(1 + _TIMED_STEPS):  # the first one compiles and allocates
        started = time.perf_counter()
        micro_batches = run.prefetcher.take(first, first)
        results = training_step(accelerator, run.model, run.optimizer, micro_batches, settings.max_grad_norm)
        results["loss"].item()
        times.append(time.perf_counter() - started)
        _check_stop(run)
    snapshot = take_snapshot(accelerator, run.model, run.optimizer, run.state, run.tokenizer_files)
    for evaluation in run.evaluations:
        if evaluation.every:
            with contextlib.suppress(EvaluationStopped):
                evaluation.run(run)
            _check_stop(run)
    seconds, size = decide_on_main(accelerator, lambda: _checkpoint_roundtrip(snapshot, run.checkpoints))
    own = [float(peak_memory(accelerator.device)), -float(memory_for_this_process(accelerator.device))]
    memory, room = accelerator.gather(torch.tensor([own], device=accelerator.device)).amax(dim=0).tolist()
    tokens = run.config.batch_plan.size(first * run.config.sequence_length)
    return PreflightResult(min(times[1:]), tokens, int(memory), -int(room), size, seconds)


def _check_stop(run: Run) -> None:
    """Ends the preflight if any rank is asked to stop (`UserError` on the first rank). Collective."""
    run.agree_on_stopping()
    if run.stopping:
        if not run.accelerator.is_main_process:
            sys.exit(2)  # the first rank prints the error for all
        raise UserError(f"the preflight was stopped ({run.stop_reason})")


def _checkpoint_roundtrip(snapshot: Snapshot | None, checkpoints: Path) -> tuple[float, int]:
    """Writes a checkpoint and reads it again; returns the seconds until it was on the disk, and its bytes."""
    assert snapshot is not None, "runs on the first rank only"
    started = time.perf_counter()
    folder = write_checkpoint(snapshot, checkpoints)
    seconds = time.perf_counter() - started
    if problem := find_corruption(folder):
        raise UserError(f"{folder}: it is not read as it was written ({problem}); check the disk")
    load_state(folder)
    from_pretrained(folder, use_safetensors=True)
    return seconds, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forecast(config: TrainingConfig, result: PreflightResult, parameters: int, step: int, position: int) -> str:
    """The time, memory and disk space that a run of these settings will take, after `step` steps and `position`
    sequences that are done already. Raises `UserError` if the checkpoints do not fit on the disk."""
    steps = config.max_steps - step
    tokens = config.batch_plan.tokens(config.max_steps) - position * config.sequence_length
    speed = result.step_tokens / result.step_seconds
    needed, room = room_for_checkpoints(config, result.checkpoint_bytes)
    hub = f", access to {config.hub.hub_model_id}" if config.hub.push_to_hub else ""
    return "\n".join(
        [
            "",
            f"preflight   every part works: steps, each evaluation, a checkpoint written and read{hub}",
            f"parameters  {parameters:,}",
            f"steps       {steps:,}: {tokens:,} tokens",
            f"time        {tokens / speed / 3600:,.2f} hours of training at {speed:,.0f} tokens/s",
            f"memory      {gib(result.memory)} of {gib(result.room)} for each process",
            f"disk        {gib(needed)} of {gib(room)} for {checkpoints_kept(config)} checkpoints of "
            f"{gib(result.checkpoint_bytes)}; one is written in {result.saving_seconds:.1f} s",
        ]
    )


def checkpoints_kept(config: TrainingConfig) -> int:
    """The most checkpoints that exist at one time: those to keep, the best, and the one that is being written."""
    kept, steps = config.checkpointing, config.max_steps
    count = kept.save_total_limit + 2 + (steps // kept.keep_every if kept.keep_every else 0)
    return min(count, steps // kept.save_steps + steps // config.evaluation.eval_steps + 1)


def room_for_checkpoints(config: TrainingConfig, checkpoint_bytes: int) -> tuple[int, int]:
    """Bytes that the checkpoints of a run will take, and bytes available to them, their present ones included. Raises
    `UserError` if the disk is too small."""
    count = checkpoints_kept(config)
    needed = count * checkpoint_bytes
    place = next(path for path in (config.run_folder, *config.run_folder.absolute().parents) if path.exists())
    ours = complete_checkpoints(config.checkpoints)
    present = sum(path.stat().st_size for folder in ours for path in folder.rglob("*") if path.is_file())
    room = shutil.disk_usage(place).free + present
    if needed > room:
        kept = config.checkpointing
        raise UserError(
            f"{count} checkpoints of {gib(checkpoint_bytes)} take {gib(needed)}, and {place} has room for {gib(room)}; "
            f"make room, or keep fewer (save_total_limit={kept.save_total_limit}, keep_every={kept.keep_every})"
        )
    return needed, room


def gib(count: int) -> str:
    """A number of bytes, as in "1.39 GiB"."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.1f} MiB"

"""What a run does about a step that diverged: pass over its batch, go back, or end."""

import sys
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from data_prep.common.command_line import UserError
from eval.common.models import from_pretrained
from training.checkpointing.snapshot import load_training_state
from training.checkpointing.storage import complete_checkpoints, load_state
from training.engine.distributed import agreed
from training.loop.run import Run
from training.records.step_metrics import LaunchedStep
from training.resilience.divergence import Diverged, diagnosis, judge
from training.resilience.resume import newest_intact


def see_to(run: Run, done: LaunchedStep, metrics: dict[str, Any]) -> None:
    """Judge a step by its numbers, and do what the settings say of one that went wrong.

    Raises:
        Diverged: for one that the run is to go back for.
        UserError: for one that ends the run.
    """
    settings, state = run.config.divergence, run.state
    # An overflowing gradient is how fp16's loss scale finds its size.
    grad_norm = metrics["grad_norm"] if run.accelerator.scaler is None else 0.0
    wrong = judge(metrics["loss"], grad_norm, state.recent, settings)
    if wrong is None:
        if settings.spike_zscore:
            state.recent = [*state.recent, (metrics["loss"], grad_norm)][-settings.spike_window :]
        return
    what = f"step {done.step}: {wrong.what}"
    if not wrong.finite and settings.on_nonfinite == "halt":
        raise _end(run, Diverged(what, done.batch), "on_nonfinite='halt'")
    if len(state.skipped) >= settings.max_skipped:
        raise _end(run, Diverged(what, done.batch), f"max_skipped={settings.max_skipped} batches were passed over")
    if wrong.finite or settings.on_nonfinite == "rollback":
        run.saver.wait()
        if agreed(run.accelerator, lambda: bool(complete_checkpoints(run.checkpoints))):
            raise Diverged(what, done.batch)
    if wrong.finite:
        run.log.print(f"{what}; there is no checkpoint to go back to yet, and the run goes on")
        return
    state.skipped.append(done.batch)
    run.log.print(f"{what}; the weights are as they were, and {_named(done.batch)} passed over")


def go_back(run: Run, diverged: Diverged) -> None:
    """Restore the last checkpoint, and pass over the batch when the run comes to it again.

    Raises:
        UserError: where all checkpoints are damaged.
    """
    checkpoint, found = agreed(run.accelerator, lambda: newest_intact(run.checkpoints))
    for line in found:
        run.log.print(line)
    if checkpoint is None:
        raise _end(run, diverged, "no checkpoint to go back to is whole")
    before = run.state
    run.state = replace(
        load_state(checkpoint),
        data=before.data,
        settings=before.settings,
        num_processes=before.num_processes,
        skipped=[*before.skipped, diverged.batch],
    )
    weights = from_pretrained(checkpoint, use_safetensors=True).state_dict()
    set_model_state_dict(run.model, weights, options=StateDictOptions(full_state_dict=True))
    load_training_state(run.accelerator, run.model, run.optimizer, run.state, checkpoint)
    run.meter.take()  # of a step that there is no more
    run.log.cut(run.state.step)
    run.log.print(
        f"{diverged.what}; back to step {run.state.step}, and {_named(diverged.batch)} passed over from there"
    )


def _named(batch: tuple[int, int]) -> str:
    return f"sequences {batch[0]} to {batch[1] - 1} are"


def _end(run: Run, diverged: Diverged, why: str) -> UserError:
    """The error that ends a run: what happened, in which batch and layer, and what is left of the run."""
    where = diagnosis(run.accelerator, run.bare_model, run.prefetcher.make(diverged.batch[0]))
    if not run.accelerator.is_main_process:
        sys.exit(2)  # the first process says it for all
    first, stop = diverged.batch
    folders = " ".join(run.data.names)
    run.saver.wait()
    complete = complete_checkpoints(run.checkpoints)
    return UserError(
        f"{diverged.what}, and {why}\n"
        f"  layer  {where}\n"
        f"  batch  python -m data_prep.inspect {folders} --run {run.config.run_folder} --sequences {first}:{stop}\n"
        f"  left   {f'{complete[-1]}; --resume goes on from it' if complete else 'no checkpoint yet'}"
    )

"""The response to a step that diverged: skip its batch, roll back, or end the run."""

import shlex
import sys
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from data_prep.common.command_line import UserError
from eval.common.models import from_pretrained
from training.checkpointing.snapshot import load_training_state
from training.checkpointing.storage import complete_checkpoints, load_state
from training.engine.distributed import decide_on_main
from training.loop.run import Run
from training.records.step_metrics import LaunchedStep
from training.resilience.divergence import Diverged, check_step, locate_divergence
from training.resilience.resume import newest_intact


def handle_divergence(run: Run, step: LaunchedStep, metrics: dict[str, Any]) -> None:
    """Checks a step by its metrics, and responds to divergence as the settings say.

    Raises:
        Diverged: if the run has to roll back.
        UserError: if the run has to end.
    """
    settings, state = run.config.divergence, run.state
    # fp16's loss scale finds its size by gradients that overflow.
    grad_norm = metrics["grad_norm"] if run.accelerator.scaler is None else 0.0
    divergence = check_step(metrics["loss"], grad_norm, state.recent, settings)
    if divergence is None:
        if settings.spike_zscore:
            state.recent = [*state.recent, (metrics["loss"], grad_norm)][-settings.spike_window :]
        return
    problem = f"step {step.step}: {divergence.problem}"
    if not divergence.finite and settings.on_nonfinite == "halt":
        raise _end(run, Diverged(problem, step.batch), "on_nonfinite='halt'")
    if len(state.skipped) >= settings.max_skipped:
        raise _end(run, Diverged(problem, step.batch), f"max_skipped={settings.max_skipped} batches are skipped")
    if divergence.finite or settings.on_nonfinite == "rollback":
        run.saver.wait()
        if decide_on_main(run.accelerator, lambda: bool(complete_checkpoints(run.checkpoints))):
            raise Diverged(problem, step.batch)
    if divergence.finite:
        run.log.print(f"{problem}; the run continues, as there is no checkpoint to roll back to yet")
        return
    state.skipped.append(step.batch)
    run.log.print(f"{problem}; the weights are unchanged, {_named(step.batch)} skipped")


def rollback(run: Run, diverged: Diverged) -> None:
    """Restores the last checkpoint; the batch is skipped when the run reaches it again. Collective.

    Raises:
        UserError: if all checkpoints are damaged.
    """
    checkpoint, messages = decide_on_main(run.accelerator, lambda: newest_intact(run.checkpoints))
    for line in messages:
        run.log.print(line)
    if checkpoint is None:
        raise _end(run, diverged, "no checkpoint to roll back to is intact")
    before = run.state
    run.state = replace(
        load_state(checkpoint),
        data=before.data,
        settings=before.settings,
        num_processes=before.num_processes,
        skipped=[*before.skipped, diverged.batch],
    )
    weights = from_pretrained(checkpoint, use_safetensors=True).state_dict()
    # Under FSDP's `cpu_ram_efficient_loading` only the first rank has read them.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=run.accelerator.is_fsdp2)
    set_model_state_dict(run.model, weights, options=options)
    load_training_state(run.accelerator, run.model, run.optimizer, run.state, checkpoint)
    run.timer.take()  # the launched step is undone
    run.log.truncate(run.state.step)
    run.restart_trackers()
    run.log.print(f"{diverged.problem}; rolled back to step {run.state.step}, {_named(diverged.batch)} skipped")


def _named(batch: tuple[int, int]) -> str:
    return f"sequences {batch[0]} to {batch[1] - 1} are"


def _end(run: Run, diverged: Diverged, reason: str) -> UserError:
    """The error that ends a run: its problem, the layer, the batch, and the last checkpoint. Collective."""
    where = locate_divergence(run.accelerator, run.bare_model, run.prefetcher.make(diverged.batch[0]))
    if not run.accelerator.is_main_process:
        sys.exit(2)  # the first rank prints the error for all
    first, stop = diverged.batch
    names, folder = shlex.join(run.data.names), shlex.quote(str(run.config.run_folder))
    run.saver.wait()
    complete = complete_checkpoints(run.checkpoints)
    left = f"{complete[-1]}; --resume_from_checkpoint continues from it" if complete else "no checkpoint yet"
    return UserError(
        f"{diverged.problem}, and {reason}\n"
        f"  layer  {where}\n"
        f"  batch  python -m data_prep.inspect {names} --run {folder} --sequences {first}:{stop}\n"
        f"  saved  {left}"
    )

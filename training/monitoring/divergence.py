"""Divergence (a non-finite loss or gradient, or a spike) and the response: skip the batch, roll back, or halt."""

import math
import shlex
import statistics
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from data_prep.common.command_line import UserError
from eval.common.models import from_pretrained
from modeling import GPTModel
from training.checkpointing.checkpoint import load_training_state
from training.checkpointing.store import complete_checkpoints, load_state, newest_intact
from training.engine.data import Batch
from training.engine.distributed import decide_on_main
from training.run import Run
from training.settings.schedule import Step
from training.settings.schema import DivergenceSettings


class Diverged(Exception):
    """A step to roll back, with its batch as the positions of the first sequence and the one after the last."""

    def __init__(self, problem: str, batch: tuple[int, int]) -> None:
        super().__init__(problem)
        self.batch = batch
        self.skipping = f"sequences {batch[0]} to {batch[1] - 1} are skipped"


def find_divergence(
    loss: float, grad_norm: float, recent: list[tuple[float, float]], settings: DivergenceSettings
) -> str | None:
    """Describes a step's non-finite value or spike; None for a good step.

    A spike is a loss or a gradient norm more than `spike_zscore` standard deviations above the mean of the last
    `spike_window` steps.

    Args:
        recent: losses and gradient norms of the steps before.
    """
    values = {"loss": loss, "gradient norm": grad_norm}
    for name, value in values.items():
        if not math.isfinite(value):
            return f"the {name} is {value}"
    if settings.spike_zscore and len(recent) >= settings.spike_window:
        for (name, value), before in zip(values.items(), zip(*recent, strict=True), strict=True):
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if deviation and value > mean + settings.spike_zscore * deviation:
                return (
                    f"the {name} is {value:.4g}, {(value - mean) / deviation:.1f} standard deviations above the mean "
                    f"{mean:.4g} of the last {len(before)} steps"
                )
    return None


def handle_divergence(run: Run, step: Step, metrics: dict[str, Any]) -> None:
    """Checks a step's metrics and responds to divergence as the settings say. Collective.

    Raises:
        Diverged: if the run has to roll back.
        UserError: if the run has to end.
    """
    settings, state = run.config.divergence, run.state
    # fp16's loss scale finds its size by gradients that overflow.
    loss, grad_norm = metrics["loss"], metrics["grad_norm"] if run.accelerator.scaler is None else 0.0
    problem = find_divergence(loss, grad_norm, state.recent, settings)
    if problem is None:
        if settings.spike_zscore:
            state.recent = [*state.recent, (loss, grad_norm)][-settings.spike_window :]
        return
    diverged = Diverged(f"step {step.number}: {problem}", step.batch)
    updated = math.isfinite(loss) and math.isfinite(grad_norm)
    if not updated and settings.on_nonfinite == "halt":
        raise _end(run, diverged, "on_nonfinite='halt'")
    if len(state.skipped) >= settings.max_skipped:
        raise _end(run, diverged, f"max_skipped={settings.max_skipped} batches are skipped")
    if updated or settings.on_nonfinite == "rollback":
        run.saver.wait()
        if decide_on_main(run.accelerator, lambda: bool(complete_checkpoints(run.checkpoints))):
            raise diverged
    if updated:
        run.log.print(f"{diverged}; the run continues, as there is no checkpoint to roll back to yet")
        return
    state.skipped.append(step.batch)
    run.log.print(f"{diverged}; the weights are unchanged, {diverged.skipping}")


def rollback(run: Run, diverged: Diverged) -> None:
    """Restores the last checkpoint; the batch is skipped when the run reaches it again. Collective. Raises `UserError`
    if all checkpoints are damaged."""
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
    run.first_step = run.saved_step = run.state.step
    run.metrics.pop()  # the launched step is undone
    run.log.truncate(run.state.step)
    run.restart_trackers()
    run.log.print(f"{diverged}; rolled back to step {run.state.step}, {diverged.skipping}")


def _end(run: Run, diverged: Diverged, reason: str) -> UserError:
    """Returns the error that ends a run: its problem, the layer, the batch, and the last checkpoint. Collective."""
    micro_batches = run.prefetcher.make(diverged.batch[0])
    found = gather_object([_first_nonfinite(run.bare_model, micro_batches, run.accelerator.device)])
    if not run.accelerator.is_main_process:
        sys.exit(2)  # the first rank prints the error for all
    where = "no layer: all results of the forward pass are finite"
    if ranks := [rank for rank, name in enumerate(found) if name is not None]:
        where = f"the first result that is not finite is that of {found[ranks[0]]}"
        where += f" on rank {ranks[0]}" if len(found) > 1 else ""
    first, stop = diverged.batch
    names, folder = shlex.join(run.data.names), shlex.quote(str(run.config.run_folder))
    run.saver.wait()
    complete = complete_checkpoints(run.checkpoints)
    left = f"{complete[-1]}; --resume_from_checkpoint continues from it" if complete else "no checkpoint yet"
    return UserError(
        f"{diverged}, and {reason}\n"
        f"  layer  {where}\n"
        f"  batch  python -m data_prep.inspect {names} --run {folder} --sequences {first}:{stop}\n"
        f"  saved  {left}"
    )


@torch.no_grad()
def _first_nonfinite(model: GPTModel, micro_batches: list[Batch], device: torch.device) -> str | None:
    """Reruns a batch; returns the innermost of the first modules with a non-finite output. Collective."""
    found: list[str] = []

    def check(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(result, Tensor) and not result.isfinite().all():
            found.append(name)

    hooks = [module.register_forward_hook(partial(check, name)) for name, module in model.named_modules() if name]
    try:
        for batch in micro_batches:  # all of them, also after a find: other ranks may wait for this one
            with torch.compiler.set_stance("force_eager"):  # hooks would make compiled blocks compile again
                model(**send_to_device(batch, device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None

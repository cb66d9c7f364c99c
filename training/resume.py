"""The checkpoint that a run resumes from, and whether it may."""

from pathlib import Path

from data_prep.common.command_line import UserError
from eval.common.models import read_config
from eval.report import FILE_NAME
from training.checkpointing.store import (
    RunState,
    complete_checkpoints,
    find_corruption,
    foreign_checkpoints,
    has_committed,
    load_state,
    newest_intact,
    step_of,
)
from training.settings.schema import NEWEST, TrainingConfig

# The settings behind parts of `Data.identity`, where their names differ.
_SETTING_OF = {"shards": "data", "shares": "data_weights"}
_OF_A_COOLDOWN = {"max_steps", "max_tokens", "cooldown_steps"}


class AlreadyFinished(Exception):
    """All steps of the run are done."""


def find_checkpoint(config: TrainingConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, None for a new run; and messages about other checkpoints.

    An existing run is never overwritten. Of its own checkpoints the newest intact one is taken; damaged ones are
    quarantined. Raises `UserError` if there is no such checkpoint, or the run has continued beyond it.
    """
    run, folder = config.run, config.checkpoints
    asked_for = run.resume_from_checkpoint
    complete, committed = complete_checkpoints(folder), has_committed(config.run_folder)
    chosen = None if asked_for is None or asked_for == NEWEST else Path(asked_for).resolve()
    warnings = [
        f"warning: {path} was not made by this program; step {step_of(path)} cannot be saved there, move it"
        for path in foreign_checkpoints(folder)
    ]
    if asked_for == NEWEST or (run.auto_resume and committed):
        newest, messages = newest_intact(folder)
        if newest is not None:
            return newest, warnings + messages
        remedy = "remove that folder to start anew" if committed else "start without --resume_from_checkpoint"
        none_left = f"{config.run_folder} has no complete checkpoint to resume from"
        raise UserError("; ".join([*messages, none_left, remedy]))
    if chosen is not None and (problem := find_corruption(chosen)):
        raise UserError(
            f"resume_from_checkpoint={asked_for!r} is damaged, or no complete checkpoint ({problem}); take an earlier "
            f"one"
        )
    newest = complete[-1] if complete else None
    if committed and (chosen is None or newest is None or chosen != newest.resolve()):
        last = f"its last checkpoint is {newest.name}" if newest else "none of its checkpoints is intact"
        raise UserError(
            f"{config.run_folder} holds a run already ({last}); continue it with --resume_from_checkpoint, choose "
            f"another --output_dir, or remove that folder"
        )
    return chosen, warnings


def is_finished(config: TrainingConfig, state: RunState) -> bool:
    """Whether all steps are done, and the report is written."""
    return state.step >= config.max_steps and (config.report_folder / FILE_NAME).exists()


def resumed_state(config: TrainingConfig, checkpoint: Path, now: RunState) -> RunState:
    """The state saved in `checkpoint`, with the data and settings of `now`. Raises `UserError` for another model, and
    for data or settings that change the result, unless `override` names them."""
    state = load_state(checkpoint)
    settings_file = checkpoint.parents[1] / "config.yaml"
    if different := config.different_sizes(read_config(str(checkpoint)).to_dict()):
        raise UserError(
            f"{checkpoint} is another model ({'; '.join(different)}); resume with the settings in {settings_file}"
        )
    if state.data.get("tokenizer") != now.data["tokenizer"]:
        raise UserError(f"{checkpoint} was trained on the data of another tokenizer; resume with the data of its run")
    of_another_run = checkpoint.resolve().parent != config.checkpoints.resolve()
    changed = _differences(state, now)
    allowed = {*config.run.override, *(_OF_A_COOLDOWN if of_another_run else ())}
    if refused := {name: line for name, line in changed.items() if name not in allowed}:
        raise UserError(
            f"{checkpoint} was saved under settings that give another result ({'; '.join(refused.values())}); resume "
            f"with those in {settings_file}, or confirm the change: --override {' '.join(refused)}"
        )
    done = of_another_run or (is_finished(config, state) and not config.run.auto_resume)
    if state.step > config.max_steps or (state.step == config.max_steps and done):
        confirmed = "" if of_another_run else " and give --override max_steps"
        raise UserError(
            f"{checkpoint} is at step {state.step} of max_steps={config.max_steps}; to continue, raise it{confirmed}"
        )
    if of_another_run:
        state.best_step = state.best_val_loss = None
    state.data, state.settings = now.data, now.settings
    return state


def _differences(saved: RunState, now: RunState) -> dict[str, str]:
    """Differences of data and settings that change the result, keyed by the name of the setting."""
    changed = {
        _SETTING_OF.get(name, name): _SETTING_OF.get(name, f"{name}={saved.data.get(name)}, now {value}")
        for name, value in now.data.items()
        if value != saved.data.get(name)
    }
    for name in saved.settings | now.settings:  # of another version, one of them has more
        if (before := saved.settings.get(name)) != (value := now.settings.get(name)):
            changed[name] = f"{name}={before}, now {value}"
    return changed

"""Which checkpoint a run goes on from, and whether it may."""

from pathlib import Path

from data_prep.common.command_line import UserError
from eval.common.models import read_config
from eval.report import FILE_NAME
from training.checkpointing.storage import (
    RunState,
    complete_checkpoints,
    damage,
    has_committed,
    in_the_way,
    load_state,
    step_of,
)
from training.engine.model import different_sizes
from training.settings.schema import NEWEST, TrainingConfig

# The names of settings that parts of `Data.identity` come from, where they differ.
_SETTING_OF = {"shards": "data", "shares": "data_weights"}
_OF_A_COOLDOWN = {"max_steps", "max_tokens", "cooldown_steps", "cooldown_tokens"}


class AlreadyFinished(Exception):
    """There is nothing left of a run to go on with."""


def find_checkpoint(config: TrainingConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None to start anew, and what there is to say of others.

    A run that is there is never overwritten unasked. Of its own checkpoints the newest that is whole is taken; damaged
    ones are set aside.

    Raises:
        UserError: where there is none, or where the run has gone on beyond it.
    """
    chosen, said = _choose(config)
    others = [f"warning: {path} was not made by this program; step {step_of(path)} cannot be saved there, move it"
              for path in in_the_way(config.checkpoints)]  # fmt: skip
    return chosen, [*others, *said]


def _choose(config: TrainingConfig) -> tuple[Path | None, list[str]]:
    run, folder = config.run, config.checkpoints
    complete, committed = complete_checkpoints(folder), has_committed(config.run_folder)
    chosen = None if run.resume in (None, NEWEST) else Path(run.resume).resolve()
    if run.resume == NEWEST or (run.auto_resume and committed):
        newest, said = newest_intact(folder)
        if newest is not None:
            return newest, said
        remedy = "remove that folder to start anew" if committed else "start without --resume"
        raise UserError("; ".join([*said, f"{config.run_folder} has no complete checkpoint to resume from; {remedy}"]))
    if chosen is not None and (wrong := damage(chosen)):
        raise UserError(f"resume={run.resume!r} is damaged, or no complete checkpoint ({wrong}); take an earlier one")
    newest = complete[-1] if complete else None
    if committed and (chosen is None or newest is None or chosen != newest.resolve()):
        last = f"its last checkpoint is {newest.name}" if newest else "none of its checkpoints is left whole"
        raise UserError(
            f"{config.run_folder} holds a run already ({last}); go on with it by --resume, choose another --run_name, "
            f"or remove that folder"
        )
    return chosen, []


def newest_intact(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written, and what there is to say of newer ones, of which the
    damaged are set aside."""
    said = []
    for folder in reversed(complete_checkpoints(checkpoints)):
        if (wrong := damage(folder)) is None:
            return folder, said
        said.append(f"{set_aside(folder)} is damaged ({wrong}) and set aside")
    return None, said


def set_aside(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that is not taken for one; what can be saved of it is not lost."""
    number = 0
    while (aside := checkpoint.with_name(f"damaged_{checkpoint.name}{f'_{number}' if number else ''}")).exists():
        number += 1
    return checkpoint.rename(aside)


def is_finished(config: TrainingConfig, state: RunState) -> bool:
    """Whether nothing is left to do: all steps are done, and all that follows the last."""
    return state.step >= config.max_steps and (config.report_folder / FILE_NAME).exists()


def resumed_state(config: TrainingConfig, checkpoint: Path, now: RunState) -> RunState:
    """The state saved in `checkpoint`, under the data and the settings of now.

    Raises:
        UserError: where the run would go on as another model, and where data or settings that decide its result have
            changed without having been named by `override`.
    """
    state = load_state(checkpoint)
    settings_file = checkpoint.parents[1] / "config.yaml"
    if different := different_sizes(config, read_config(str(checkpoint)).to_dict()):
        raise UserError(
            f"{checkpoint} is another model ({'; '.join(different)}); resume with the settings in {settings_file}"
        )
    if state.data.get("tokenizer") != now.data["tokenizer"]:
        raise UserError(f"{checkpoint} was trained on the data of another tokenizer; resume with the data of its run")
    of_another_run = checkpoint.resolve().parent != config.checkpoints.resolve()
    changed = _differences(state, now)
    allowed = {*config.run.override, *(_OF_A_COOLDOWN if of_another_run else ())}
    if refused := [line for name, line in changed.items() if name not in allowed]:
        names = " ".join(name for name in changed if name not in allowed)
        raise UserError(
            f"{checkpoint} was saved under settings that give another result ({'; '.join(refused)}); resume with those "
            f"in {settings_file}, or say that you mean it: --override {names}"
        )
    if state.step > config.max_steps or (is_finished(config, state) and not config.run.auto_resume):
        raise UserError(
            f"{checkpoint} is at step {state.step} of max_steps={config.max_steps}; to go on, raise it and give "
            f"--override max_steps"
        )
    if of_another_run:
        state.best_step = state.best_val_loss = None
    state.data, state.settings = now.data, now.settings
    return state


def _differences(saved: RunState, now: RunState) -> dict[str, str]:
    """By the setting's name, what of the data and of the settings that decide a result is not as it was saved."""
    changed = {
        _SETTING_OF.get(name, name): _SETTING_OF.get(name, f"{name}={value}, not {saved.data.get(name)}")
        for name, value in now.data.items()
        if value != saved.data.get(name)
    }
    for name, value in now.settings.items():
        if value != saved.settings.get(name):
            changed[name] = f"{name}={value}, not {saved.settings.get(name)}"
    return changed

"""Folders of checkpoints: their names, completeness and state, which are removed, and which one a run resumes from.

A checkpoint is a real folder named exactly `step_` and eight digits, with the sentinel `COMPLETE` in it. Everything
else beside it is ignored, and left alone.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError
from data_prep.common.files import file_hash, write_text
from data_prep.common.schema import STRICT, Count, Positive, Sha256, read_json
from training.settings.schedule import Step
from training.settings.schema import NEWEST, TrainingConfig

COMPLETE = "COMPLETE"
STATE = Path("training_state")
_COMMITTED = "committed.json"  # in the run's folder: it has saved a checkpoint, which may be lost by now
_NAME = re.compile(r"step_(\d{8})")
_PARTIAL = re.compile(r"\.step_\d{8}\.(partial|removing)")
_DAMAGED = re.compile(r"damaged_step_\d{8}(_\d+)?")
_NEEDED = {"config.json", "tokenizer.json", str(STATE / "state.json"), str(STATE / "optimizer.safetensors")}


@dataclass
class RunState:
    """Everything that changes during a run besides weights, optimizer and random numbers.

    Attributes:
        data: `Data.identity`, on which the order of data depends.
        settings: the settings that affect the result.
        num_processes: number of processes that saved it.
        step: optimizer steps done.
        position: training sequences consumed.
        best_val_loss, best_step: the lowest validation loss so far, in nats per token; that step is saved.
        skipped: batches without an update, as the positions of their first sequence and of the one after their last.
        recent: loss and gradient norm of the last `spike_window` steps.
        grad_scaler: the loss scale of fp16.
    """

    __pydantic_config__ = STRICT

    data: dict[str, Any]
    settings: dict[str, Any]
    num_processes: Positive
    step: Count = 0
    position: Count = 0
    best_val_loss: float | None = None
    best_step: Count | None = None
    skipped: list[tuple[Count, Count]] = field(default_factory=list)
    recent: list[tuple[float, float]] = field(default_factory=list)
    grad_scaler: dict[str, int | float] = field(default_factory=dict)

    def advance(self, step: Step) -> None:
        """Counts a step."""
        self.step, self.position = step.number + 1, step.batch[1]

    def update_best(self, val_loss: float) -> bool:
        """Notes the validation loss of this step if it is the lowest so far; returns whether it is."""
        if not math.isfinite(val_loss) or (self.best_val_loss is not None and val_loss >= self.best_val_loss):
            return False
        self.best_val_loss, self.best_step = val_loss, self.step
        return True


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint, which may not exist yet."""
    return checkpoints / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint, by its name and its sentinel."""
    sentinel = folder / COMPLETE
    return (
        _NAME.fullmatch(folder.name) is not None
        and folder.is_dir()
        and not folder.is_symlink()
        and sentinel.is_file()
        and not sentinel.is_symlink()
    )


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, oldest first.

    Raises:
        OSError: for a folder that exists and cannot be read, which is not the same as an empty one.
    """
    return sorted(path for path in _entries(checkpoints) if is_checkpoint(path))


def foreign_checkpoints(checkpoints: Path) -> list[Path]:
    """Entries with the name of a checkpoint that this program did not make: it could not save that step there."""
    return [path for path in _entries(checkpoints) if _NAME.fullmatch(path.name) and not is_checkpoint(path)]


def partial_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints that a killed run was writing or removing, by their exact names."""
    return [
        path
        for path in _entries(checkpoints)
        if _PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return []


def mark_committed(run_folder: Path, step: int) -> None:
    """Records that the run has saved a checkpoint, with the step of the first one."""
    if not (run_folder / _COMMITTED).exists():
        write_text(run_folder / _COMMITTED, json.dumps({"step": step}) + "\n")


def has_committed(run_folder: Path) -> bool:
    """Whether the run has ever saved a checkpoint, even if none is left."""
    names = [path.name for path in _entries(run_folder / "checkpoints")]
    damaged = any(_DAMAGED.fullmatch(name) for name in names)
    return damaged or (run_folder / _COMMITTED).exists() or bool(complete_checkpoints(run_folder / "checkpoints"))


def partial_folder(folder: Path) -> Path:
    """The folder in which a checkpoint is written before it is renamed."""
    return folder.with_name(f".{folder.name}.partial")


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; it is renamed first, so that a half-removed one is never taken for complete."""
    removing = folder.with_name(f".{folder.name}.removing")
    if removing.exists():
        shutil.rmtree(removing)
    folder.rename(removing)
    shutil.rmtree(removing)


def prune_checkpoints(
    checkpoints: Path, save_total_limit: int, keep_every: int, best_step: int | None, in_use: Collection[Path] = ()
) -> None:
    """Removes all checkpoints but the newest `save_total_limit`, the best, those of every `keep_every` steps (0: none)
    and those in use; and the partial ones of killed runs. Nothing may be being written.

    If the best could not be written (on a full disk, say), any other may be the best one on the disk: all stay.
    """
    for partial in partial_checkpoints(checkpoints):
        shutil.rmtree(partial)
    if best_step is not None and not is_checkpoint(checkpoint_folder(checkpoints, best_step)):
        return
    for folder in complete_checkpoints(checkpoints)[:-save_total_limit]:
        step = step_of(folder)
        if step != best_step and not (keep_every and step % keep_every == 0) and folder not in in_use:
            remove_checkpoint(folder)


def find_corruption(folder: Path) -> str | None:
    """The problem of a checkpoint's files; None if they are as they were written.

    Raises:
        OSError: if the disk cannot be read at the moment, which says nothing about the checkpoint.
    """
    try:
        hashes = read_json(folder / COMPLETE, dict[str, Sha256])
        if outside := [name for name in hashes if Path(name).is_absolute() or ".." in Path(name).parts]:
            return f"{COMPLETE} lists {outside[0]!r}, outside of the folder"
        if missing := _NEEDED - hashes.keys():
            return f"{COMPLETE} does not list {', '.join(sorted(missing))}"
        damaged = [name for name, digest in hashes.items() if file_hash(folder / name) != digest]
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, UserError, ValueError) as error:
        return str(error)
    return f"not as written: {', '.join(damaged)}" if damaged else None


def load_state(folder: Path) -> RunState:
    """The `RunState` of a complete checkpoint.

    Raises:
        UserError: for a folder without one.
    """
    try:
        return read_json(folder / STATE / "state.json", RunState)
    except (FileNotFoundError, NotADirectoryError, UserError) as error:
        raise UserError(f"{folder}: not a checkpoint to resume from ({error})") from error


# The settings behind parts of `Data.identity`, where their names differ.
_SETTING_OF = {"shards": "data", "shares": "data_weights"}
_OF_A_COOLDOWN = {"max_steps", "max_tokens", "cooldown_steps"}


class AlreadyFinished(Exception):
    """All steps of the run are done."""


def find_checkpoint(config: TrainingConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, None for a new run; and messages about other checkpoints.

    An existing run is never overwritten. Of its own checkpoints the newest intact one is taken; damaged ones are
    quarantined.

    Raises:
        UserError: if there is no such checkpoint, or the run has continued beyond it.
    """
    chosen, messages = _choose(config)
    foreign = [
        f"warning: {path} was not made by this program; step {step_of(path)} cannot be saved there, move it"
        for path in foreign_checkpoints(config.checkpoints)
    ]
    return chosen, foreign + messages


def _choose(config: TrainingConfig) -> tuple[Path | None, list[str]]:
    run, folder = config.run, config.checkpoints
    asked_for = run.resume_from_checkpoint
    complete, committed = complete_checkpoints(folder), has_committed(config.run_folder)
    chosen = None if asked_for is None or asked_for == NEWEST else Path(asked_for).resolve()
    if asked_for == NEWEST or (run.auto_resume and committed):
        newest, messages = newest_intact(folder)
        if newest is not None:
            return newest, messages
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
    return chosen, []


def newest_intact(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are as they were written; newer ones are quarantined, with a message each."""
    messages: list[str] = []
    for folder in reversed(complete_checkpoints(checkpoints)):
        if (problem := find_corruption(folder)) is None:
            return folder, messages
        messages.append(f"{folder} is damaged ({problem}) and was renamed to {quarantine(folder).name}")
    return None, messages


def quarantine(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it is not resumed from; what can be saved of it is not lost."""
    number = 0
    while (renamed := checkpoint.with_name(f"damaged_{checkpoint.name}{f'_{number}' if number else ''}")).exists():
        number += 1
    return checkpoint.rename(renamed)


def is_finished(config: TrainingConfig, state: RunState) -> bool:
    """Whether all steps are done, and the report is written."""
    from eval.report import FILE_NAME  # loads numpy

    return state.step >= config.max_steps and (config.report_folder / FILE_NAME).exists()


def resumed_state(config: TrainingConfig, checkpoint: Path, now: RunState) -> RunState:
    """The state saved in `checkpoint`, with the data and settings of `now`.

    Raises:
        UserError: for another model, and for data or settings that change the result, unless `override` names them.
    """
    from eval.common.models import read_config  # loads transformers

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
    """By the name of the setting, each difference of data and settings that changes the result."""
    changed = {
        _SETTING_OF.get(name, name): _SETTING_OF.get(name, f"{name}={saved.data.get(name)}, now {value}")
        for name, value in now.data.items()
        if value != saved.data.get(name)
    }
    for name in saved.settings | now.settings:  # of another version, one of them has more
        if (before := saved.settings.get(name)) != (value := now.settings.get(name)):
            changed[name] = f"{name}={before}, now {value}"
    return changed

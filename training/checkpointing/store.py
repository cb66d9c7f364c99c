"""The folders of checkpoints: their names, their completeness, their state, and which are removed.

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

COMPLETE = "COMPLETE"
STATE = Path("training_state")
_COMMITTED = "committed.json"  # in the run's folder: it has saved a checkpoint, which may be lost by now
_NAME = re.compile(r"step_(\d{8})")
_PARTIAL = re.compile(r"\.step_\d{8}\.(partial|removing)")
_DAMAGED = re.compile(r"damaged_step_\d{8}(_\d+)?")
_NEEDED = {"config.json", "tokenizer.json", str(STATE / "state.json"), str(STATE / "optimizer.safetensors")}


@dataclass
class RunState:
    """Everything that changes during a run, apart from weights, optimizer and random states.

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
        """Records the validation loss of this step if it is the lowest so far; returns whether it is."""
        if not math.isfinite(val_loss) or (self.best_val_loss is not None and val_loss >= self.best_val_loss):
            return False
        self.best_val_loss, self.best_step = val_loss, self.step
        return True


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Folder of a step's checkpoint, which may not exist yet."""
    return checkpoints / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step_"))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint, by name and sentinel."""
    sentinel = folder / COMPLETE
    is_real = folder.is_dir() and sentinel.is_file() and not folder.is_symlink() and not sentinel.is_symlink()
    return _NAME.fullmatch(folder.name) is not None and is_real


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Raises `OSError` for a folder that exists but cannot be read."""
    return sorted(path for path in _entries(checkpoints) if is_checkpoint(path))


def foreign_checkpoints(checkpoints: Path) -> list[Path]:
    """Entries that are named like a checkpoint but were not made by this program, which could not save that step
    there."""
    return [path for path in _entries(checkpoints) if _NAME.fullmatch(path.name) and not is_checkpoint(path)]


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
    entries = _entries(run_folder / "checkpoints")
    saved = any(_DAMAGED.fullmatch(path.name) or is_checkpoint(path) for path in entries)
    return saved or (run_folder / _COMMITTED).exists()


def quarantine(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that no run resumes from it and nothing in it is lost."""
    number = 0
    while (renamed := checkpoint.with_name(f"damaged_{checkpoint.name}{f'_{number}' if number else ''}")).exists():
        number += 1
    return checkpoint.rename(renamed)


def newest_intact(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Newest checkpoint with unchanged files; damaged newer ones are quarantined, with a message each."""
    messages: list[str] = []
    for folder in reversed(complete_checkpoints(checkpoints)):
        if (problem := find_corruption(folder)) is None:
            return folder, messages
        messages.append(f"{folder} is damaged ({problem}) and was renamed to {quarantine(folder).name}")
    return None, messages


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint, renaming it first so that a half-removed one is never taken for complete."""
    removing = folder.with_name(f".{folder.name}.removing")
    if removing.exists():
        shutil.rmtree(removing)
    folder.rename(removing)
    shutil.rmtree(removing)


def prune_checkpoints(
    checkpoints: Path, save_total_limit: int, keep_every: int, best_step: int | None, in_use: Collection[Path] = ()
) -> None:
    """Removes all checkpoints except the newest `save_total_limit`, the best, every `keep_every` steps (0: none) and
    those in use; also leftovers of killed runs. Nothing may be being written.

    If the best could not be written (on a full disk, say), any other may be the best one on the disk: all stay.
    """
    for path in _entries(checkpoints):
        if _PARTIAL.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    if best_step is not None and not is_checkpoint(checkpoint_folder(checkpoints, best_step)):
        return
    for folder in complete_checkpoints(checkpoints)[:-save_total_limit]:
        step = step_of(folder)
        if step != best_step and not (keep_every and step % keep_every == 0) and folder not in in_use:
            remove_checkpoint(folder)


def find_corruption(folder: Path) -> str | None:
    """Describes what is wrong with a checkpoint's files; None if they are unchanged. Raises `OSError` if the disk
    cannot be read right now, which says nothing about the checkpoint."""
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
    """Loads the `RunState` of a complete checkpoint (`UserError` for any other folder)."""
    try:
        return read_json(folder / STATE / "state.json", RunState)
    except (FileNotFoundError, NotADirectoryError, UserError) as error:
        raise UserError(f"{folder}: not a checkpoint to resume from ({error})") from error

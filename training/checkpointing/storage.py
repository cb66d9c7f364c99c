"""The folders of checkpoints: which there are, which are whole, what each says of its run, which may go.

A checkpoint of ours is a real folder, called exactly `step_` and eight digits, with `COMPLETE` in it. Whatever else
lies beside it is invisible here, and left alone.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError
from data_prep.common.files import file_hash, write_text
from data_prep.common.schema import STRICT, Count, Positive, Sha256, read_json

COMPLETE = "COMPLETE"
STATE = Path("training_state")
_COMMITTED = "committed.json"  # in the run's folder: that it has saved a checkpoint, whatever has become of it
_NAME = re.compile(r"step_(\d{8})")
_HALF_MADE = re.compile(r"\.step_\d{8}\.(partial|removing)")
_DAMAGED = re.compile(r"damaged_step_\d{8}(_\d+)?")
_NEEDED = {"config.json", "tokenizer.json", str(STATE / "state.json"), str(STATE / "optimizer.safetensors")}


@dataclass
class RunState:
    """All that changes during a run besides weights, optimizer and random numbers.

    Attributes:
        data: what decides the order of data.
        settings: those that decide the result.
        num_processes: that the state was saved by.
        step: optimizer steps done.
        position: training sequences consumed.
        best_val_loss, best_step: the lowest validation loss of a saved checkpoint, in nats per token.
        skipped: batches that made no update, as the positions of their first sequence and of the one after their last.
        recent: loss and norm of the gradient of the last steps, as far back as a spike is measured against.
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


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return checkpoints / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of ours, by its name and its mark."""
    mark = folder / COMPLETE
    return (
        _NAME.fullmatch(folder.name) is not None
        and folder.is_dir()
        and not folder.is_symlink()
        and mark.is_file()
        and not mark.is_symlink()
    )


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints that were written to the end, oldest first.

    Raises:
        OSError: where the folder is there and cannot be read, which is not the same as none.
    """
    return sorted(path for path in _entries(checkpoints) if is_checkpoint(path))


def in_the_way(checkpoints: Path) -> list[Path]:
    """What has the name of a checkpoint and is none of ours: where that step would have to be saved."""
    return [path for path in _entries(checkpoints) if _NAME.fullmatch(path.name) and not is_checkpoint(path)]


def half_made(checkpoints: Path) -> list[Path]:
    """What a killed run has left of a checkpoint that it was writing or removing, by its exact name."""
    return [
        path
        for path in _entries(checkpoints)
        if _HALF_MADE.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder / name for name in os.listdir(folder))
    except FileNotFoundError:
        if folder.is_symlink():
            raise
        return []


def mark_committed(run_folder: Path, step: int) -> None:
    """Note that the run has saved a checkpoint, the first time at that step."""
    if not (run_folder / _COMMITTED).exists():
        write_text(run_folder / _COMMITTED, json.dumps({"step": step}) + "\n")


def has_committed(run_folder: Path) -> bool:
    """Whether the run has ever saved a checkpoint, also where none is left."""
    names = [path.name for path in _entries(run_folder / "checkpoints")]
    damaged = any(_DAMAGED.fullmatch(name) for name in names)
    return damaged or (run_folder / _COMMITTED).exists() or bool(complete_checkpoints(run_folder / "checkpoints"))


def partial_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is moved into place."""
    return folder.with_name(f".{folder.name}.partial")


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: renamed first, so that a half-removed one is never taken for whole."""
    removing = folder.with_name(f".{folder.name}.removing")
    if removing.exists():
        shutil.rmtree(removing)
    folder.rename(removing)
    shutil.rmtree(removing)


def prune_checkpoints(checkpoints: Path, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove all checkpoints but the newest `keep_last`, the best and, unless 0, those of each `keep_every` steps; and
    what kills have left half-made. To be called when nothing is being written.

    While the best has not been written (its disk was full, say), the one that was the best before it may be any: all
    stay.
    """
    for remains in half_made(checkpoints):
        shutil.rmtree(remains)
    if best_step is not None and not is_checkpoint(checkpoint_folder(checkpoints, best_step)):
        return
    for folder in complete_checkpoints(checkpoints)[:-keep_last]:
        step = step_of(folder)
        if step != best_step and not (keep_every and step % keep_every == 0):
            remove_checkpoint(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None for one that is as it was written.

    Raises:
        OSError: where the disk cannot be read at the moment, which says nothing of the checkpoint.
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
    """The `RunState` of a checkpoint, which is taken to be whole.

    Raises:
        UserError: for a folder without one.
    """
    try:
        return read_json(folder / STATE / "state.json", RunState)
    except (FileNotFoundError, NotADirectoryError, UserError) as error:
        raise UserError(f"{folder}: not a checkpoint to resume from ({error})") from error

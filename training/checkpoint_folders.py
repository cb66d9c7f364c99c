"""The folders of checkpoints: which there are, which are whole, what each says of its run, which may go."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.cli import UserError
from data_prep.shards import file_hash

COMPLETE = "COMPLETE"
STATE = Path("training_state")


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

    data: dict[str, Any]
    settings: dict[str, Any]
    num_processes: int
    step: int = 0
    position: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    skipped: list[list[int]] = field(default_factory=list)
    recent: list[list[float]] = field(default_factory=list)
    grad_scaler: dict[str, Any] = field(default_factory=dict)


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or will be."""
    return checkpoints / f"step_{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints that were written to the end, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{COMPLETE}"))


def incomplete_checkpoints(checkpoints: Path) -> list[Path]:
    """Those that a run was killed in the middle of moving into place or of removing."""
    return [path for path in sorted(checkpoints.glob("step_*")) if path.is_dir() and not (path / COMPLETE).exists()]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its mark first of all, so that a half-removed one is never taken for whole."""
    if folder.exists():
        (folder / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(folder)


def prune_checkpoints(checkpoints: Path, keep_last: int, keep_every: int, best_step: int | None) -> None:
    """Remove all complete checkpoints but the newest `keep_last`, the best and, unless 0, those of each `keep_every`
    steps; and what kills have left half-made. To be called when nothing is being written.

    While the best has not been written (its disk was full, say), the one that was the best before it may be any: all
    stay.
    """
    for remains in (*incomplete_checkpoints(checkpoints), *checkpoints.glob(".step_*.partial")):
        shutil.rmtree(remains)
    if best_step is not None and not (checkpoint_folder(checkpoints, best_step) / COMPLETE).exists():
        return
    for folder in complete_checkpoints(checkpoints)[:-keep_last]:
        step = int(folder.name.removeprefix("step_"))
        if step != best_step and not (keep_every and step % keep_every == 0):
            remove_checkpoint(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None for one that is as it was written.

    Raises:
        OSError: where the disk cannot be read at the moment, which says nothing of the checkpoint.
    """
    try:
        hashes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        damaged = [name for name, digest in hashes.items() if file_hash(folder / name) != digest]
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError) as error:
        return str(error)
    return f"not as written: {', '.join(damaged)}" if damaged else None


def load_state(folder: Path) -> RunState:
    """The `RunState` of a checkpoint, which is taken to be whole.

    Raises:
        UserError: for a folder without one.
    """
    try:
        return RunState(**json.loads((folder / STATE / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: not a checkpoint to resume from ({error})") from error

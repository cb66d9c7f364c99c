"""RUN/hub: checkpoints that wait to be uploaded, out of reach of whatever removes older ones."""

import json
import os
import shutil
from pathlib import Path

from training.checkpoint_folders import COMPLETE, STATE, complete_checkpoints, load_state

FOLDER = "hub"


def put(checkpoint: Path, run_folder: Path) -> Path:
    """Let a complete checkpoint wait to be uploaded, by links to its files where the disk has them: they take no room.
    What it takes to train on is left out. What waits already under its name is replaced.

    Returns:
        Where it waits.
    """
    outbox = run_folder / FOLDER
    waiting, partial = outbox / checkpoint.name, outbox / f".{checkpoint.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")):
        if Path(name).parts[0] != str(STATE):
            _link(checkpoint / name, partial / name)
    shutil.rmtree(waiting, ignore_errors=True)
    return partial.rename(waiting)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a disk without links
        shutil.copy2(file, name)


def waiting(run_folder: Path) -> list[Path]:
    """The checkpoints that wait to be uploaded, oldest first."""
    return sorted((run_folder / FOLDER).glob("step_*"))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def released_checkpoint(run_folder: Path, strategy: str) -> Path | None:
    """The checkpoint that a finished run is known by: its last, or under the strategy `best` its best; None if there is
    none."""
    complete = complete_checkpoints(run_folder / "checkpoints")
    if not complete or strategy != "best":
        return complete[-1] if complete else None
    best = load_state(complete[-1]).best_step
    return next((path for path in complete if step_of(path) == best), complete[-1])

"""RUN/hub: checkpoints that wait to be uploaded, out of reach of whatever removes older ones."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from training.checkpoint_folders import COMPLETE, STATE

FOLDER = "hub"
_TAKEN = ".uploading_"


def put(checkpoint: Path, run_folder: Path) -> Path:
    """Let a complete checkpoint wait to be uploaded, by links to its files where the disk has them: they take no room.
    What it takes to train on is left out. Another one of that step that waits is replaced.

    Returns:
        Where it waits.
    """
    outbox = run_folder / FOLDER
    place, partial = outbox / checkpoint.name, outbox / f".{checkpoint.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8")):
        if Path(name).parts[0] != str(STATE):
            _link(checkpoint / name, partial / name)
    shutil.rmtree(place, ignore_errors=True)
    return partial.rename(place)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a disk without links
        shutil.copy2(file, name)


def waiting(run_folder: Path) -> list[Path]:
    """The checkpoints that wait to be uploaded, or are being, oldest first."""
    outbox = run_folder / FOLDER
    names = {path.name.removeprefix(_TAKEN) for path in (*outbox.glob("step_*"), *outbox.glob(f"{_TAKEN}step_*"))}
    return [outbox / name for name in sorted(names)]


@contextlib.contextmanager
def taken(checkpoint: Path) -> Iterator[Path]:
    """Take a waiting checkpoint out of reach of one that replaces it, under the name that is yielded. It is removed if
    all goes well, else it waits again."""
    folder = checkpoint.rename(checkpoint.with_name(_TAKEN + checkpoint.name))
    try:
        yield folder
        shutil.rmtree(folder)
    finally:
        recover(checkpoint.parents[1])


def recover(run_folder: Path) -> None:
    """Let what was taken, and neither uploaded nor put back, wait again, unless it has been replaced."""
    for folder in (run_folder / FOLDER).glob(f"{_TAKEN}step_*"):
        name = folder.with_name(folder.name.removeprefix(_TAKEN))
        if name.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(name)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step_"))

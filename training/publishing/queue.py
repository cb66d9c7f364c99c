"""RUN/hub: checkpoints that wait to be uploaded, out of reach of whatever removes older ones."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.schema import Sha256, read_json
from training.checkpointing.storage import COMPLETE

FOLDER = "hub"
_TAKEN = ".uploading_"
MARK = "made_by_gpt_accelerate"  # in each of the folders, which are nobody else's
_NAME = re.compile(r"(\.uploading_)?step_\d{8}")


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
    (partial / MARK).touch()
    for name in read_json(checkpoint / COMPLETE, dict[str, Sha256]):
        if Path(name).name == name:  # neither what it takes to train on, nor what lies elsewhere
            _link(checkpoint / name, partial / name)
    if place in _entries(outbox):
        shutil.rmtree(place)
    return partial.rename(place)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a disk without links
        shutil.copy2(file, name)


def waiting(run_folder: Path) -> list[Path]:
    """The checkpoints that wait to be uploaded, or are being, oldest first."""
    outbox = run_folder / FOLDER
    return [outbox / name for name in sorted({path.name.removeprefix(_TAKEN) for path in _entries(outbox)})]


def _entries(outbox: Path) -> list[Path]:
    """The folders of checkpoints in it, by their exact names and their mark; what else lies there is left alone."""
    names = sorted(os.listdir(outbox)) if outbox.is_dir() else []
    paths = [outbox / name for name in names if _NAME.fullmatch(name)]
    return [path for path in paths if not path.is_symlink() and (path / MARK).is_file()]


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
    for folder in _entries(run_folder / FOLDER):
        if not folder.name.startswith(_TAKEN):
            continue
        name = folder.with_name(folder.name.removeprefix(_TAKEN))
        if name.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(name)

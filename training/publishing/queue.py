"""RUN/hub: the queue of checkpoints to upload, which the removal of older checkpoints does not touch."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.schema import Sha256, read_json
from training.checkpointing.storage import COMPLETE

FOLDER = "hub"
SENTINEL = "made_by_gpt_accelerate"  # in each folder of the queue: other folders are left alone
_CLAIMED = ".uploading_"
_NAME = re.compile(r"(\.uploading_)?step_\d{8}")


def enqueue(checkpoint: Path, run_folder: Path) -> Path:
    """Queues a complete checkpoint for upload, without its training state; one of the same step is replaced.

    Its files are links where the disk has them, and take no room.

    Returns:
        Its folder in the queue.
    """
    queue = run_folder / FOLDER
    place, partial = queue / checkpoint.name, queue / f".{checkpoint.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / SENTINEL).touch()
    for name in read_json(checkpoint / COMPLETE, dict[str, Sha256]):
        if Path(name).name == name:  # not in a sub-folder, as the training state is, nor outside
            _link(checkpoint / name, partial / name)
    if place in _entries(queue):
        shutil.rmtree(place)
    return partial.rename(place)


def _link(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # a disk without links
        shutil.copy2(file, name)


def pending(run_folder: Path) -> list[Path]:
    """The queued checkpoints, those that are being uploaded included, oldest first."""
    queue = run_folder / FOLDER
    return [queue / name for name in sorted({path.name.removeprefix(_CLAIMED) for path in _entries(queue)})]


def _entries(queue: Path) -> list[Path]:
    """The folders with the exact name of a checkpoint and a sentinel in them."""
    names = sorted(os.listdir(queue)) if queue.is_dir() else []
    paths = [queue / name for name in names if _NAME.fullmatch(name)]
    return [path for path in paths if not path.is_symlink() and (path / SENTINEL).is_file()]


@contextlib.contextmanager
def claim(checkpoint: Path) -> Iterator[Path]:
    """Claims a queued checkpoint, so that a newer one of its step does not replace it, under the name that is yielded.

    It is removed on success; on an error it is pending again.
    """
    folder = checkpoint.rename(checkpoint.with_name(_CLAIMED + checkpoint.name))
    try:
        yield folder
        shutil.rmtree(folder)
    finally:
        release_claims(checkpoint.parents[1])


def release_claims(run_folder: Path) -> None:
    """Makes claimed checkpoints pending again, unless a newer one has taken their place."""
    for folder in _entries(run_folder / FOLDER):
        if not folder.name.startswith(_CLAIMED):
            continue
        name = folder.with_name(folder.name.removeprefix(_CLAIMED))
        if name.exists():
            shutil.rmtree(folder)
        else:
            folder.rename(name)

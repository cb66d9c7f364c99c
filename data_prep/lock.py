"""One process at a time for a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from data_prep.cli import UserError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there, for this process alone, and remove it again if it stays empty.
    The system lets go of it however the process ends; the file that remains of a killed one does no harm.

    Raises:
        UserError: where another process holds it.
    """
    import fcntl

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    # A file, opened to be written: network file systems lock nothing else.
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another process; wait for it, or stop it") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something is in it now
                for empty in made:
                    empty.rmdir()

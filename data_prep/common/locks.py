"""One process at a time for a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.command_line import UserError

LOCK_NAME = ".gpt-accelerate.lock"


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
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
    with open(path, "a", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that another process has just let go of and removed guards nothing.
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise UserError(f"{folder} is in use by another process; wait for it, or stop it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for empty in made:
                with contextlib.suppress(OSError):  # it is gone, or something is in it now
                    empty.rmdir()

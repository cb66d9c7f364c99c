"""One process at a time for a folder.

The library `filelock` closes its descriptor in forked children: once a killed process leaves workers that still write
into the folder, its lock is free. Here they hold it with the same descriptor until they end.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.command_line import UserError

LOCK_NAME = ".gpt-accelerate.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process (`UserError` if another holds it). Creates missing folders, and removes them at
    the end if they are still empty. The system releases the lock when the process ends, and the file of a killed one
    is harmless."""
    import fcntl

    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    # Network file systems lock only files that are open for writing.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
    with open(path, "a", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have released and removed this file after it was opened here.
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise UserError(f"{folder} is in use by another process; wait for it, or stop it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            for empty in created:
                with contextlib.suppress(OSError):  # already removed, or no longer empty
                    empty.rmdir()

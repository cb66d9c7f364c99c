"""Locks: one process per folder.

The library `filelock` closes its descriptor in forked children: once a killed process leaves workers that still write
into the folder, its lock is free. Here they hold it with the same descriptor until they end.
"""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text

LOCK_NAME = ".gpt-accelerate.lock"
# Network file systems lock only files that are open for writing.
_FLAGS = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks `folder` for this process (`UserError` if another holds it). Creates missing folders, and removes them at
    the end if they are still empty. The system releases the lock when the process ends, and the file of a killed one
    is harmless. On a file system without locks the existence of the file is the lock; that of a killed process is
    recognized on the same machine only."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    descriptor = _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        for empty in created:
            with contextlib.suppress(OSError):  # already removed, or no longer empty
                empty.rmdir()


def _acquire(path: Path) -> int:
    """Acquires the lock; returns the file descriptor that holds it."""
    import fcntl

    try:
        descriptor, is_new = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        descriptor, is_new = os.open(path, _FLAGS), False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path.parent} is in use by another process; wait for it, or stop it") from error
        except OSError:  # not supported, as on NFS and Lustre under some options, and in some containers
            if is_new:
                os.write(descriptor, _owner(os.getpid()).encode())
            else:
                _remove_stale(path)
        # Another process may have released and removed this file after it was opened here.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return _acquire(path)


def _owner(pid: int) -> str:
    """Identifies a process on this machine; containers with the same host name differ in their PID namespace."""
    namespace = Path("/proc/self/ns/pid")
    return f"process {pid} on {socket.gethostname()} ({os.readlink(namespace) if namespace.is_symlink() else '-'})"


def _remove_stale(path: Path) -> None:
    """Removes the lock file of a process that has ended; raises `UserError` for any other."""
    owner = read_text(path)
    found = re.match(r"process (\d+) on ", owner)
    if found and owner == _owner(pid := int(found[1])) and not _is_running(pid):
        path.unlink()
        return
    raise UserError(
        f"{path.parent} is in use by {owner or 'an unknown process'}; wait for it, or stop it, or remove {path} if it "
        f"has ended"
    )


def _is_running(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # the first process of a container may not reap
    except psutil.NoSuchProcess:
        return False

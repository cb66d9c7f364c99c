"""Files: opened without waiting, read within bounds, written as a whole or not at all."""

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

from data_prep.common.command_line import UserError, first_line

MAX_BYTES = 1 << 30  # of a file that is read as a whole; metrics.jsonl of a million steps has a third of it


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it, without waiting: the name may be that of a pipe (`UserError` for what is no file)."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: not a regular file")
    return file


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a regular file of at most `MAX_BYTES`.

    Args:
        errors: what `bytes.decode` does about bytes that are not UTF-8.

    Raises:
        FileNotFoundError: where there is none.
        UserError: for what is no regular file (reading a pipe would wait for ever), for one that is too large or not
            UTF-8, and for one that cannot be read.
    """
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise UserError(f"{path}: {size:,} bytes; a file of its kind has at most {MAX_BYTES:,}")
            return file.read(MAX_BYTES + 1).decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def partial_name(name: str) -> str:
    """The name that a file has until it is whole."""
    return f".{name}.partial"


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all: under another name, brought to the disk, and renamed."""
    temporary = path.with_name(partial_name(path.name))
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # of a full disk, say
        temporary.unlink(missing_ok=True)
        raise


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes (`UserError` for what is no regular file: reading a pipe would wait for ever)."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

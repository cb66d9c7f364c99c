"""Files: opened without blocking, read within bounds, written atomically."""

import contextlib
import hashlib
import io
import os
import stat
from pathlib import Path

from data_prep.common.command_line import UserError, first_line

MAX_BYTES = 1 << 30  # of a file that is read into memory; metrics.jsonl of a million steps has a third of it


def open_regular(path: Path) -> io.BufferedReader:
    """Opens a file for reading without blocking on a pipe (`UserError` for anything but a regular file)."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise UserError(f"{path}: not a regular file")
    return file


def read_text(path: Path, errors: str = "strict") -> str:
    """Reads a regular file of at most `MAX_BYTES`, without a byte-order mark and with universal newlines.

    Args:
        errors: as in `bytes.decode`, for bytes that are not UTF-8.

    Raises:
        FileNotFoundError: for a missing file.
        UserError: for a file that is not regular, too large, not UTF-8 or not readable.
    """
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                raise UserError(f"{path}: {size:,} bytes; a file of its kind has at most {MAX_BYTES:,}")
            text = file.read(MAX_BYTES + 1).decode("utf-8", errors).removeprefix("\ufeff")
            return text.replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error


def describe_path(path: Path) -> str | None:
    """Says what a path actually is ("it is ...") where something else was expected, and suggests the likely part; None
    for any other folder."""
    if not path.exists():
        beside = path.parent.name == "checkpoints" and describe_path(path.parent)
        return f"missing; {path.parent} is {beside}" if beside else "missing"
    if path.is_file():
        return f"a file; its folder is {path.parent}"
    if (path / "manifest.json").is_file() and (path / "tokenizer").is_dir():
        return f"a data folder; its tokenizer is {path / 'tokenizer'}"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return "a model"
    depths = ("", "checkpoints/", "*/checkpoints/")  # of checkpoints, a run, several runs
    if steps := [found for depth in depths for found in path.glob(f"{depth}step_*/COMPLETE")]:
        return f"a folder with checkpoints, such as {max(steps).parent}"
    if (path / "checkpoints").is_dir() and (path / "config.yaml").is_file():
        return "a run without a complete checkpoint"
    whole = describe_path(path.parent) if path.name in ("tokenizer", "training_state") else None
    return f"a part of {path.parent}, {whole}" if whole else None


def partial_name(name: str) -> str:
    """Temporary name of a file that `write_text` writes."""
    return f".{name}.partial"


class AtomicFile:
    """A file written under a temporary name; `commit` flushes it to the disk and renames it to `path`."""

    def __init__(self, path: Path, temporary: Path) -> None:
        self.path, self.temporary = path, temporary
        self.file = open(temporary, "wb")  # noqa: SIM115  closed by commit or discard

    def commit(self) -> None:
        """Publishes the complete file under its final name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.temporary.replace(self.path)

    def discard(self) -> None:
        """Removes the temporary file."""
        with contextlib.suppress(OSError):  # closing writes the last bytes, which a full disk refuses again
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = AtomicFile(path, path.with_name(partial_name(path.name)))
    try:
        partial.file.write(text.encode("utf-8"))
        partial.commit()
    except BaseException:
        partial.discard()
        raise


def file_hash(path: Path) -> str:
    """Returns the sha256 of a regular file (`UserError` for any other kind)."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

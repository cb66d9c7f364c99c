"""Token shards: files of exactly so many tokens each, `.npy` or llm.c's `.bin`, written and read."""

import contextlib
import os
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep.common.command_line import UserError, first_line
from data_prep.common.files import file_hash

FORMATS = ("npy", "bin")
_NAME = re.compile(r"(.+)_(val|train)_\d{6}\.(npy|bin)(\.tmp)?", re.DOTALL)
# llm.c's and modded-nanogpt's header: 256 int32, of which the magic number, the version and the count of tokens.
_BIN_HEADER_INTS = 256
_BIN_KINDS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


def smallest_dtype(vocab_size: int) -> str:
    """The narrowest of uint16 and uint32 that holds every id of the vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_name(folder: Path, split: str, number: int, form: str) -> str:
    """How the shards that preparation writes into a folder are called."""
    return f"{folder.resolve().name}_{split}_{number:06d}.{form}"


def is_shard_name(name: str, folder: Path) -> bool:
    """Whether a file is called as a shard that preparation writes into `folder`, or has begun to write."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == folder.resolve().name


class ShardFile:
    """A shard that is being written: under a temporary name until `finish`, its length given at the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.temporary = path.with_name(path.name + ".tmp")
        self.tokens = 0
        self.file = open(self.temporary, "wb")  # noqa: SIM115  closed by finish or discard
        _write_header(self.file, path.suffix, dtype, 0)

    def add(self, tokens: np.ndarray) -> None:
        """Append `[tokens]`, already of the shard's dtype."""
        self.file.write(tokens.data)
        self.tokens += len(tokens)

    def finish(self) -> str:
        """Complete the file, give it its name, and return its sha256."""
        start = self.file.tell() - self.tokens * np.dtype(self.dtype).itemsize
        self.file.seek(0)
        _write_header(self.file, self.path.suffix, self.dtype, self.tokens)
        assert self.file.tell() == start, "the header's length depends on the count"
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        digest = file_hash(self.temporary)
        self.temporary.rename(self.path)
        return digest

    def discard(self) -> None:
        """Leave nothing behind."""
        with contextlib.suppress(OSError):  # a full disk, again, for the last few bytes
            self.file.close()
        self.temporary.unlink(missing_ok=True)


def _write_header(file: IO[bytes], suffix: str, dtype: str, tokens: int) -> None:
    if suffix == ".bin":
        header = np.zeros(_BIN_HEADER_INTS, dtype="<i4")
        header[:3] = (*_BIN_KINDS[dtype], tokens)
        file.write(header.tobytes())
        return
    description: dict[str, Any] = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, description)


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, `[tokens]` uint16 or uint32, mapped rather than read.

    Reads `.npy`, and the `.bin` of llm.c and modded-nanogpt (magic 20240520, version 1: uint16; 20240801, version 7:
    uint32).

    Raises:
        UserError: for a file that is not such a shard, or is shorter or longer than it says.
    """
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("not a regular file" if path.exists() else "no such file")
        dtype, start, count = (_read_bin_header if path.suffix == ".bin" else _read_npy_header)(path)
        expected = start + count * np.dtype(dtype).itemsize
        if path.stat().st_size != expected:
            raise ValueError(f"{path.stat().st_size:,} bytes, and not the {expected:,} of {count:,} {dtype} tokens")
        return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(count,)) if count else np.empty(0, dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable shard ({first_line(error)})") from error


def _read_npy_header(path: Path) -> tuple[str, int, int]:
    """The dtype, where the tokens begin, and how many there are; a `ValueError` for what is no shard."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"version {version} of the npy format")
        try:
            shape, _, dtype = readers[version](file)
        except Exception as error:  # it is parsed as Python, and whatever that raises comes up
            raise ValueError(f"its header cannot be read ({type(error).__name__})") from error
        if len(shape) != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError(f"a shard is 1-D uint16 or uint32, this is {len(shape)}-D {dtype}")
        return str(dtype), file.tell(), shape[0]


def _read_bin_header(path: Path) -> tuple[str, int, int]:
    """As `_read_npy_header`, of llm.c's format."""
    header = np.fromfile(path, dtype="<i4", count=3)
    kinds = {kind: dtype for dtype, kind in _BIN_KINDS.items()}
    dtype = kinds.get(tuple(header[:2].tolist()))
    if len(header) < 3 or dtype is None:
        raise ValueError(f"its header is {header.tolist()}, not one of {[[*kind, 'tokens'] for kind in kinds]}")
    if header[2] < 0:
        raise ValueError(f"its header says {header[2]} tokens")
    return dtype, _BIN_HEADER_INTS * 4, int(header[2])

"""Token shards: `.npy` files, or llm.c's `.bin`."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from data_prep.common.command_line import UserError, first_line
from data_prep.common.files import AtomicFile, file_hash

Split = Literal["train", "val"]
Format = Literal["npy", "bin"]
Dtype = Literal["uint16", "uint32"]
_CHUNK_TOKENS = 1 << 20
_NAME = re.compile(r"(.+)_(val|train)_\d{6}\.(npy|bin)(\.tmp)?", re.DOTALL)
# llm.c's and modded-nanogpt's header: 256 int32, which begin with magic number, version and number of tokens.
_BIN_HEADER_INTS = 256
_BIN_KINDS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}


def smallest_dtype(vocab_size: int) -> Dtype:
    """The narrower of uint16 and uint32 that holds all ids of the vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_name(folder: Path, split: str, number: int, form: str) -> str:
    """Name of a shard that preparation writes into `folder`."""
    return f"{folder.resolve().name}_{split}_{number:06d}.{form}"


def is_shard_name(name: str, folder: Path) -> bool:
    """Whether a name is that of a shard, complete or not, that preparation writes into `folder`."""
    match = _NAME.fullmatch(name)
    return match is not None and match[1] == folder.resolve().name


class ShardFile(AtomicFile):
    """A shard being written: under a temporary name until `finish`, which also writes the number of tokens."""

    def __init__(self, path: Path, dtype: str) -> None:
        super().__init__(path, path.with_name(path.name + ".tmp"))
        self.dtype, self.tokens = dtype, 0
        _write_header(self.file, path.suffix, dtype, 0)

    def add(self, tokens: np.ndarray) -> None:
        """Appends `[tokens]` of the shard's dtype."""
        self.file.write(tokens.data)
        self.tokens += len(tokens)

    def finish(self) -> str:
        """Completes the file and returns its sha256."""
        start = self.file.tell() - self.tokens * np.dtype(self.dtype).itemsize
        self.file.seek(0)
        _write_header(self.file, self.path.suffix, self.dtype, self.tokens)
        assert self.file.tell() == start, "the header's length depends on the count"
        self.commit()
        return file_hash(self.path)


def _write_header(file: BinaryIO, suffix: str, dtype: str, tokens: int) -> None:
    if suffix == ".bin":
        header = np.zeros(_BIN_HEADER_INTS, dtype="<i4")
        header[:3] = (*_BIN_KINDS[dtype], tokens)
        file.write(header.tobytes())
        return
    description: dict[str, Any] = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, description)


def open_shard(path: Path) -> np.ndarray:
    """Memory-maps a shard: `[tokens]` uint16 or uint32.

    Reads `.npy`, and `.bin` of llm.c and modded-nanogpt (magic 20240520, version 1: uint16; 20240801, version 7:
    uint32). Raises a `UserError` for any other file, and for one of another length than its header says.
    """
    try:
        if not path.is_file():  # reading a pipe would block
            raise ValueError("not a regular file" if path.exists() else "no such file")
        tokens = _open_bin(path) if path.suffix == ".bin" else np.lib.format.open_memmap(path, mode="r")
        if tokens.ndim != 1 or tokens.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            raise ValueError(f"a shard is 1-D uint16 or uint32, this is {tokens.ndim}-D {tokens.dtype}")
        if (size := path.stat().st_size) != tokens.offset + tokens.nbytes:
            raise ValueError(f"{size:,} bytes, and not the {tokens.offset + tokens.nbytes:,} of {len(tokens):,} tokens")
        return tokens
    except Exception as error:  # numpy parses a header as Python and lets any error through
        raise UserError(f"{path}: not a readable shard ({first_line(error)})") from error


def _open_bin(path: Path) -> np.memmap:
    header = np.fromfile(path, dtype="<i4", count=3)
    kinds = {kind: dtype for dtype, kind in _BIN_KINDS.items()}
    if len(header) < 3 or tuple(header[:2].tolist()) not in kinds or header[2] < 0:
        raise ValueError(f"its header is {header.tolist()}, not one of {[[*kind, 'tokens'] for kind in kinds]}")
    dtype, start = kinds[tuple(header[:2].tolist())], _BIN_HEADER_INTS * 4
    return np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(int(header[2]),))


def token_documents(paths: Iterable[Path], eos_token_id: int) -> Iterator[np.ndarray]:
    """Token ids of each document, `[tokens]`; documents may cross shards, and the first may lack its start."""
    parts: list[np.ndarray] = []
    for path in paths:
        tokens = open_shard(path)
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = np.array(tokens[start : start + _CHUNK_TOKENS])  # a long document keeps no file open
            first, *others = np.split(chunk, np.flatnonzero(chunk == eos_token_id))
            parts.append(first)
            for part in others:
                if any(map(len, parts)):  # nothing precedes the first document
                    yield np.concatenate(parts)
                parts = [part]
    if parts:
        yield np.concatenate(parts)

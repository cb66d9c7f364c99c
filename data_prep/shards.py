"""Token shards: 1-D `.npy` files of exactly so many tokens each, written and read."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data_prep.cli import UserError
from data_prep.manifest import Shard

_BIN_MAGIC, _BIN_VERSION, _BIN_HEADER_BYTES = 20240520, 1, 1024


def smallest_dtype(vocab_size: int) -> str:
    """The narrowest of uint16 and uint32 that holds every id of the vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_shards(
    documents: Iterable[np.ndarray], folder: Path, name: str, shard_tokens: int, dtype: str
) -> tuple[list[Shard], int]:
    """Write `documents` (`[tokens]` each, the end of text first) into shards of exactly `shard_tokens` tokens.

    The first shard is validation, the others training, the last of them shorter. What is left of the document that
    fills the validation shard is dropped, so that no document is in both.

    Returns:
        The shards, and the number of tokens dropped.
    """
    writer = _Writer(folder, name, shard_tokens, dtype)
    dropped = 0
    for tokens in documents:
        validating = not writer.shards
        writer.documents += 1
        while len(tokens):
            tokens = writer.add(tokens)
            if validating and writer.shards:
                dropped += len(tokens)
                break
    writer.flush()
    return writer.shards, dropped


class _Writer:
    def __init__(self, folder: Path, name: str, shard_tokens: int, dtype: str) -> None:
        self.folder, self.name = folder, name
        self.buffer = np.empty(shard_tokens, dtype=dtype)
        self.filled = self.documents = 0
        self.shards: list[Shard] = []

    def add(self, tokens: np.ndarray) -> np.ndarray:
        """Take what fits into the current shard, write it if that fills it, and return the rest."""
        taken = tokens[: len(self.buffer) - self.filled]
        if int(taken.max()) > np.iinfo(self.buffer.dtype).max:
            raise UserError(f"token id {int(taken.max())} does not fit into {self.buffer.dtype}; use dtype uint32")
        self.buffer[self.filled : self.filled + len(taken)] = taken
        self.filled += len(taken)
        if self.filled == len(self.buffer):
            self.flush()
        return tokens[len(taken) :]

    def flush(self) -> None:
        if not self.filled:
            return
        split = "train" if self.shards else "val"
        path = self.folder / f"{self.name}_{split}_{len(self.shards):06d}.npy"
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.save(file, self.buffer[: self.filled])
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        self.shards.append(Shard(path.name, split, self.filled, self.documents, file_hash(path)))
        self.filled = self.documents = 0


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(path: Path) -> np.ndarray:
    """The tokens of a shard, `[tokens]` uint16 or uint32, mapped rather than read.

    Reads `.npy` and the `.bin` of llm.c and modded-nanogpt (256 int32 of header: magic, version, count; then uint16).

    Raises:
        UserError: for a file that is not such a shard, or is shorter than it says.
    """
    try:
        tokens = _open_bin(path) if path.suffix == ".bin" else np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable shard ({error})") from error
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise UserError(f"{path}: a shard is 1-D uint16 or uint32, this is {tokens.ndim}-D {tokens.dtype}")
    return tokens


def _open_bin(path: Path) -> np.ndarray:
    header = np.fromfile(path, dtype=np.int32, count=3)
    if len(header) < 3 or header[0] != _BIN_MAGIC or header[1] != _BIN_VERSION:
        raise ValueError(f"its header is {header.tolist()}, not [{_BIN_MAGIC}, {_BIN_VERSION}, count]")
    return np.memmap(path, dtype=np.uint16, mode="r", offset=_BIN_HEADER_BYTES, shape=(int(header[2]),))

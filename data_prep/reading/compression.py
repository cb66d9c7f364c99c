"""Decompression of files, which their names' suffixes announce."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

_BUFFER_BYTES = 1 << 20
# Few, as a decompressor returns all that a piece contains.
_COMPRESSED_BYTES = 4096
_ZSTD_WINDOW = 1 << 31  # that of `zstd --long=31`, the largest


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


COMPRESSED: dict[str, Callable[[], Any]] = {
    ".gz": partial(zlib.decompressobj, wbits=zlib.MAX_WBITS | 16),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
    ".zstd": _zstd,
}


def suffixes(path: str) -> tuple[str, str]:
    """The suffixes of a file's format and of its compression, in lower case; "" for a missing one."""
    name = path.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return PurePosixPath(name.removesuffix(packed)).suffix, packed


def decompressed(raw: Any, path: str) -> io.BufferedReader:
    """A file's content. Reading raises an error of its decompressor's, and `EOFError` for a file that is cut off."""
    new = COMPRESSED.get(suffixes(path)[1])
    chunks = iter(partial(raw.read, _BUFFER_BYTES), b"") if new is None else _decompress(raw, new)
    return io.BufferedReader(_Chunks(chunks), _BUFFER_BYTES)


def _decompress(raw: Any, new: Callable[[], Any]) -> Iterator[bytes]:
    """The content of all streams in a file, which zero bytes may follow, as tapes and some programs leave them."""
    stream = new()
    while piece := raw.read(_COMPRESSED_BYTES):
        while piece := piece if stream else piece.lstrip(b"\0"):
            stream = stream or new()
            yield stream.decompress(piece)
            piece = stream.unused_data
            if stream.eof:
                stream = None
    if stream is not None:
        raise EOFError("the file is cut off")


class _Chunks(io.RawIOBase):
    """Pieces of any size as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest and (chunk := next(self.chunks, None)) is not None:
            self.rest = chunk
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

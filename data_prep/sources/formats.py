"""Records of files: parquet, JSON lines, text and all that `datasets` reads, compressed or not."""

import bz2
import codecs
import copy
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data_prep.common.command_line import UserError, first_line
from data_prep.common.files import open_regular
from data_prep.sources.fields import BadRecord, Fields
from data_prep.sources.source import Position, Source

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
    """Format suffix and compression suffix in lower case; "" if missing."""
    name = path.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return PurePosixPath(name.removesuffix(packed)).suffix, packed


def decompressed(raw: Any, path: str) -> io.BufferedReader:
    """Decompressed content of a file. Reading raises the decompressor's errors, and `EOFError` for a truncated file."""
    new = COMPRESSED.get(suffixes(path)[1])
    chunks = iter(partial(raw.read, _BUFFER_BYTES), b"") if new is None else _decompress(raw, new)
    return io.BufferedReader(_Chunks(chunks), _BUFFER_BYTES)


def _decompress(raw: Any, new: Callable[[], Any]) -> Iterator[bytes]:
    """Content of all streams in a file; trailing zero bytes, as tapes leave them, are ignored."""
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
    """Presents chunks of any size as a file."""

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


T = TypeVar("T")
# Records, None for a blank line, each with the number of bytes of the file that have been read.
Records = Iterator[tuple[dict[str, Any] | None, int]]

_ANY = ("", *COMPRESSED)
# Suffixes of the formats, and those of the compressions that each is read with. No plain .json: it is rarely lines of
# records, and other programs leave such files beside the data.
FORMATS = {".parquet": ("",), ".jsonl": _ANY, ".json": tuple(COMPRESSED), ".txt": _ANY}
# Formats, by datasets' names, that files on a disk or at a URL may have; those of the Hub's data sets may have any.
STREAMED = ("csv", "json", "arrow", "webdataset", "xml")
# A stream uses no cache, but a builder of `datasets` makes its folder, unless that is on a remote file system.
_NO_CACHE = "memory://"
MAX_TEXT_DOCUMENT = 64 * 1024  # bytes; a longer text file is read as several documents
BLOCK_CHARACTERS = 1 << 20
_RECORD_CHARACTERS = 16  # size of a record beside its text
_REMOTE_READ_BYTES = 32 << 20


@dataclass(frozen=True)
class Block:
    """Records, or their documents, between two positions; `size` counts bytes of the corpus's files."""

    texts: list[Any]
    start: Position
    stop: Position
    size: int


def blocks_of(records: Records, fields: Fields, start: Position, where: str) -> Iterator[Block]:
    """Groups records into blocks with about `BLOCK_CHARACTERS` characters or ids (`UserError` for a record that
    `Fields.check` refuses).

    Args:
        start: position of the first record.
        where: names a record, with its number after it.
    """
    group: list[dict[str, Any]] = []
    size, number, before, read = 0, start.record, 0, 0
    try:
        for record, read in records:
            if record is not None:
                group.append(fields.check(record))
                size += len(record[fields.document]) + _RECORD_CHARACTERS
            number += 1
            if size >= BLOCK_CHARACTERS:
                stop = replace(start, record=number)
                yield Block(group, start, stop, read - before)
                group, size, start, before = [], 0, stop, read
    except BadRecord as error:
        raise UserError(f"{where} {number + 1}: {error}") from error
    if group:
        yield Block(group, start, replace(start, record=number), read - before)


def is_read_here(path: str) -> bool:
    """Whether a file's name has one of the `FORMATS` that are read without `datasets`."""
    kind, packed = suffixes(path)
    return packed in FORMATS.get(kind, ())


def is_plain_text(path: str) -> bool:
    """Whether a file is plain text, whose records have no fields."""
    return suffixes(path)[0] == ".txt"


def url_of(filesystem: Any, path: str) -> str:
    """URL under which `datasets` opens a file."""
    return path if "file" in filesystem.protocol else filesystem.unstrip_protocol(path)


def open_file(filesystem: Any, path: str) -> Any:
    """Opens a file of `fsspec`'s `filesystem` for reading (`UserError` for a pipe or a device)."""
    if "file" in filesystem.protocol:
        return open_regular(Path(path))
    return filesystem.open(path, "rb", block_size=_REMOTE_READ_BYTES, cache_type="readahead")


def datasets_format(path: str) -> tuple[str, dict[str, Any]] | None:
    """Loader name in `datasets` for a file, and its arguments; None if `datasets` does not read it."""
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    found = _EXTENSION_TO_MODULE.get(suffixes(path)[0])
    return found if found and found[0] in STREAMED else None


def make_builder(source: Source, filesystem: Any, path: str) -> Any:
    """The `datasets` builder for files like this one."""
    from datasets import load_dataset_builder

    name, options = datasets_format(path) or ("", {})
    return load_dataset_builder(name, data_files=[url_of(filesystem, path)], cache_dir=_NO_CACHE, **options)


def streamed(builder: Any, url: str, column: str) -> Records:
    """Records of one of a builder's files, read by `datasets`. CSV cells are text, including "NA", "null" and "007";
    only an empty cell is missing."""
    from datasets.packaged_modules.csv.csv import CsvConfig

    builder, config = copy.copy(builder), copy.copy(builder.config)
    builder.config, config.data_files = config, {"train": [url]}
    if isinstance(config, CsvConfig) and config.keep_default_na and config.na_values is None:
        config.keep_default_na, config.na_values = False, [""]
        if not config.features:  # types of all columns
            config.converters = config.converters or {column: str}
    return ((record, 0) for record in builder.as_streaming_dataset("train"))


def after(items: Iterable[T], count: int) -> Iterator[T]:
    """Skips the first `count` items."""
    rest = iter(items)
    if sum(1 for _ in islice(rest, count)) < count:
        raise UserError("a file of the source ends before the position to continue at; prepare a new folder")
    return rest


def json_lines(raw: Any, path: str, first: int) -> Records:
    """Records of JSON lines, skipping the `first` lines."""
    for number, line in enumerate(after(decompressed(raw, path), first), start=first + 1):
        yield None if line.isspace() else parse_record(line, f"{path}, line {number}"), raw.tell()


def parse_record(line: str | bytes, where: str) -> dict[str, Any]:
    """Parses a line of JSON (`UserError` unless it is an object); `where` names its origin in messages."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object but {type(record).__name__}")
    return record


def texts(raw: Any, path: str, column: str) -> Records:
    """Documents of at most `MAX_TEXT_DOCUMENT` bytes, split at a blank line, else at a line end, else anywhere.

    Read as Python reads text, without a byte-order mark and with universal newlines.
    """
    stream = decompressed(raw, path)
    text = _read(stream, len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
    while True:
        while len(text) <= MAX_TEXT_DOCUMENT and (piece := _read(stream, MAX_TEXT_DOCUMENT + 1)):
            text += piece
        if not text:
            return
        size = _cut(text)
        try:
            document = text[:size].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {_bad_byte(raw, path)} ({error.reason})") from error
        yield {column: document}, raw.tell()
        text = text[size:]


def _read(stream: io.BufferedReader, count: int) -> bytes:
    """About `count` bytes, with universal newlines; none at the end."""
    piece = stream.read(count)
    while piece.endswith(b"\r") and (more := stream.read(1)):
        piece += more
    return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in piece else piece


def _bad_byte(raw: Any, path: str) -> int:
    """Position of the first byte that is not UTF-8."""
    raw.seek(0)
    stream, decoder, read = decompressed(raw, path), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        while piece := stream.read(_BUFFER_BYTES):
            read += len(piece)
            decoder.decode(piece)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return read - len(error.object) + error.start
    return read


def _cut(data: bytes) -> int:
    if len(data) <= MAX_TEXT_DOCUMENT:
        return len(data)
    for separator in (b"\n\n", b"\n"):
        found = data.rfind(separator, MAX_TEXT_DOCUMENT // 2, MAX_TEXT_DOCUMENT)
        if found != -1:
            return found + len(separator)
    stop = MAX_TEXT_DOCUMENT
    while stop > MAX_TEXT_DOCUMENT - 4 and data[stop] & 0xC0 == 0x80:  # not within a character
        stop -= 1
    return stop


def parquet_rows(raw: Any, path: str, size: int, fields: Fields, first: int, every_field: bool) -> Records:
    """Rows of a parquet file, skipping the first `first`; few at a time, since a file does not tell how long its rows
    are.

    Args:
        size: of the file, in bytes.
        every_field: read all columns.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        # With a buffer the pages of a row group are read one by one, not all at once.
        file = parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a whole parquet file ({error})") from error
    names, metadata, skipped = file.schema_arrow.names, file.metadata, first
    fields.check_names(names)
    options = {"columns": None if every_field else fields.names, "use_threads": False}  # one column
    for group in range(metadata.num_row_groups):
        if skipped >= (rows := metadata.row_group(group).num_rows):
            skipped -= rows
            continue
        for batch in file.iter_batches(batch_size=64, row_groups=[group], **options):
            rest = batch.slice(min(skipped, batch.num_rows))
            skipped -= batch.num_rows - rest.num_rows
            found = rest.schema.names
            for cells in zip(*map(fields.values, found, rest.columns), strict=True):
                first += 1
                yield dict(zip(found, cells, strict=True)), size * first // metadata.num_rows
    after((), skipped)

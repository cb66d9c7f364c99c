"""Readers of parquet, JSON lines and plain text, and the choice among those of all formats that are read here."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError, first_line
from data_prep.common.files import open_regular
from data_prep.reading.compression import COMPRESSED, decompressed, suffixes
from data_prep.reading.fields import BadRecord, Fields
from data_prep.reading.readers import Block, Cursor, Reader
from data_prep.reading.warc import WARC_SUFFIXES, WarcReader, is_warc

_EVERY = ("", *COMPRESSED)
# Suffixes of the formats, and those of the compressions that each is read with. No plain .json: it is rarely lines of
# records, and other programs leave such files beside the data.
FORMATS = {
    ".parquet": ("",),
    ".jsonl": _EVERY,
    ".json": tuple(COMPRESSED),
    ".txt": _EVERY,
    **dict.fromkeys(WARC_SUFFIXES, ("", ".gz")),
}
MAX_TEXT_DOCUMENT = 64 * 1024  # bytes; a longer text file is read as several documents
_BUFFER_BYTES = 1 << 20
_REMOTE_READ_BYTES = 32 << 20


def read_file(
    filesystem: Any, path: str, size: int, fields: Fields, start: Cursor, every_field: bool = False
) -> Iterator[Block]:
    """Reads the records of a file from `start` on: dictionaries with the fields.

    Args:
        filesystem: the `fsspec` file system of `path`.
        size: of the file, in bytes.
        every_field: also read other fields, if the format can skip them.

    Raises:
        UserError: for a file of another format, a record without one of the fields, or another kind of document.
    """
    with _open(filesystem, path) as raw:
        if suffixes(path)[0] == ".parquet":
            reader: Reader = _Parquet(raw, path, size, fields, start, every_field)
        else:
            kind = WarcReader if is_warc(path) else _Text if is_plain_text(path) else _JsonLines
            reader = kind(raw, path, fields, start)
        yield from reader.blocks(fields.document)


def is_read_here(path: str) -> bool:
    """Whether a file is in one of `FORMATS`, by its name."""
    kind, packed = suffixes(path)
    return packed in FORMATS.get(kind, ())


def is_plain_text(path: str) -> bool:
    """Whether a file's records have no fields."""
    return suffixes(path)[0] == ".txt"


def _open(filesystem: Any, path: str) -> Any:
    if "file" in filesystem.protocol:
        return open_regular(Path(path))
    return filesystem.open(path, "rb", block_size=_REMOTE_READ_BYTES, cache_type="readahead")


class _Lines(Reader):
    """What text files have in common: a position in decompressed bytes."""

    def __init__(self, raw: Any, path: str, fields: Fields, start: Cursor) -> None:
        self.raw, self.path, self.fields = raw, path, fields
        self.file, self.record, self.offset = start.file, start.record, start.offset
        self.stream = decompressed(raw, path)
        _skip(self.stream, start.offset)

    def cursor(self) -> Cursor:
        return Cursor(self.file, self.record, self.offset)

    def bytes_read(self) -> int:
        return self.raw.tell()


def _skip(stream: io.BufferedReader, count: int) -> None:
    while count > 0:
        if not (read := len(stream.read(min(count, _BUFFER_BYTES)))):
            raise UserError("a file of the source ends before the position to continue at; prepare a new folder")
        count -= read


class _JsonLines(_Lines):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self.stream:
            self.record += 1
            self.offset += len(line)
            if not line.isspace():
                yield self.fields.check(parse_record(line, self.where))

    def where(self) -> str:
        return f"{self.path}, line {self.record}"


def parse_record(line: str | bytes, where: Callable[[], str]) -> dict[str, Any]:
    """Parses a line of JSON (`UserError` if it is no object); `where` tells its origin, for messages."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where()}: not JSON ({first_line(error)})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where()}: not a JSON object but {type(record).__name__}")
    return record


class _Text(_Lines):
    """Documents of at most `MAX_TEXT_DOCUMENT` bytes, cut at a blank line, else at a line's end, else anywhere.

    Read as Python reads text, without a byte-order mark and with universal newlines; positions are in the file's bytes.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        raw = b"" if self.offset else self.stream.read(len(codecs.BOM_UTF8))
        if raw == codecs.BOM_UTF8:
            raw, self.offset = b"", len(raw)
        text = _universal_newlines(raw)
        while True:
            while len(text) <= MAX_TEXT_DOCUMENT and (more := self.stream.read(MAX_TEXT_DOCUMENT + 1)):
                raw += more
                text = _universal_newlines(raw)
            if not text:
                return
            size = _cut(text)
            try:
                document = text[:size].decode("utf-8")
            except UnicodeDecodeError as error:
                byte = self.offset + _raw_size(raw, error.start)
                raise UserError(f"{self.path}: not UTF-8 at byte {byte} ({error.reason})") from error
            read = _raw_size(raw, size)
            self.record, self.offset, raw, text = self.record + 1, self.offset + read, raw[read:], text[size:]
            yield {self.fields.document: document}

    def where(self) -> str:
        return f"{self.path}, document {self.record}"


def _universal_newlines(raw: bytes) -> bytes:
    return raw.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in raw else raw


def _raw_size(raw: bytes, size: int) -> int:
    """Number of bytes of which `_universal_newlines` makes `size`."""
    count = size
    while missing := size - count + raw.count(b"\r\n", 0, count):
        count += missing
    return count + (raw[count - 1 : count + 1] == b"\r\n")


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


class _Parquet(Reader):
    """Rows of parquet, few at a time, as a file does not tell how long its rows are."""

    def __init__(self, raw: Any, path: str, size: int, fields: Fields, start: Cursor, every_field: bool) -> None:
        import pyarrow
        from pyarrow import parquet

        try:
            # With a buffer the pages of a row group are read one by one, not all at once.
            self.parquet = parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a whole parquet file ({error})") from error
        try:
            fields.check_names(self.parquet.schema_arrow.names)
        except BadRecord as error:
            raise UserError(f"{path}: {error}") from error
        self.path, self.size, self.fields = path, size, fields
        self.file, self.record = start.file, start.record
        self.wanted = None if every_field else fields.columns(self.parquet.schema_arrow.names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        metadata, skipped, group = self.parquet.metadata, self.record, 0
        while group < metadata.num_row_groups and metadata.row_group(group).num_rows <= skipped:
            skipped -= metadata.row_group(group).num_rows
            group += 1
        groups = range(group, metadata.num_row_groups)
        options = {"columns": self.wanted, "use_threads": False}  # one column leaves nothing to share out
        for batch in self.parquet.iter_batches(batch_size=64, row_groups=groups, **options):
            rows = batch.slice(min(skipped, batch.num_rows))
            skipped -= batch.num_rows - rows.num_rows
            for cells in zip(*map(self.fields.values, rows.schema.names, rows.columns), strict=True):
                self.record += 1
                record = dict(zip(rows.schema.names, cells, strict=True))
                yield self.fields.check(record)

    def where(self) -> str:
        return f"{self.path}, row {self.record}"

    def cursor(self) -> Cursor:
        return Cursor(self.file, self.record)

    def bytes_read(self) -> int:
        return self.size * self.record // max(1, self.parquet.metadata.num_rows)

"""Reads records of parquet, JSON lines and plain text, a block at a time, from any position."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from data_prep.common.command_line import UserError, first_line

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# No plain .json: it is rarely lines of records, and other programs leave such files beside the data.
SUFFIXES = (
    *(".parquet", ".jsonl", ".txt"),
    *(kind + packed for kind in (".jsonl", ".json", ".txt") for packed in COMPRESSED),
)
BLOCK_CHARACTERS = 1 << 20
_RECORD_CHARACTERS = 16  # size of a record beside its text
_BUFFER_BYTES = 1 << 20
MAX_TEXT_DOCUMENT = 64 * 1024  # bytes; a longer text file is read as several documents
_REMOTE_READ_BYTES = 32 << 20


@dataclass(frozen=True)
class Cursor:
    """Position in a corpus: the next record to read.

    Attributes:
        file: index of the file.
        record: number of records before it in the file.
        offset: number of decompressed bytes before it in the file; 0 in parquet, whose rows are found by number.
    """

    file: int = 0
    record: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Block:
    """Records, or their texts, between two cursors; `size` is the number of bytes of the corpus's files."""

    texts: list[Any]
    start: Cursor
    stop: Cursor
    size: int


_Records: TypeAlias = Iterator[tuple[dict[str, Any], Cursor]]  # each with the cursor after it


def read_file(
    filesystem: Any, path: str, size: int, columns: list[str], start: Cursor, every_field: bool = False
) -> Iterator[Block]:
    """Reads the records of a file from `start` on: dictionaries with `columns`; the first column is text.

    Args:
        filesystem: the `fsspec` file system of `path`.
        size: of the file, in bytes.
        every_field: also read other fields, if the format can skip them.

    Raises:
        UserError: for a file of another format, a record without one of the columns, or a first column without text.
    """
    if path.endswith(".parquet"):
        yield from _read_parquet(filesystem, path, size, columns, start, every_field)
        return
    read = _read_text if ".txt" in path[-8:] else _read_jsonl
    with _open(filesystem, path) as raw:
        records = read(_decompressed(raw, path), path, columns, start)
        yield from _grouped(records, columns[0], start, lambda _: raw.tell(), size)


def _open(filesystem: Any, path: str) -> Any:
    if "file" in filesystem.protocol:
        return filesystem.open(path, "rb")
    return filesystem.open(path, "rb", block_size=_REMOTE_READ_BYTES, cache_type="readahead")


def _decompressed(raw: Any, path: str) -> io.BufferedReader:
    import pyarrow

    stream = pyarrow.PythonFile(raw, mode="r")
    for suffix, codec in COMPRESSED.items():
        if path.endswith(suffix):
            stream = pyarrow.CompressedInputStream(stream, codec)
    return io.BufferedReader(stream, _BUFFER_BYTES)


def _grouped(
    records: _Records, text_column: str, start: Cursor, bytes_before: Callable[[Cursor], int], size: int
) -> Iterator[Block]:
    group: list[dict[str, Any]] = []
    characters, before, stop = 0, bytes_before(start), start
    for record, stop in records:
        group.append(record)
        characters += len(record[text_column]) + _RECORD_CHARACTERS
        if characters >= BLOCK_CHARACTERS:
            now = bytes_before(stop)
            yield Block(group, start, stop, now - before)
            group, characters, start, before = [], 0, stop, now
    if group:
        yield Block(group, start, stop, size - before)


def _skip(stream: io.BufferedReader, count: int) -> None:
    while count > 0:
        if not (read := len(stream.read(min(count, _BUFFER_BYTES)))):
            raise UserError("a file of the source ends before the position to continue at; prepare a new folder")
        count -= read


def _read_jsonl(stream: io.BufferedReader, path: str, columns: list[str], start: Cursor) -> _Records:
    _skip(stream, start.offset)
    offset = start.offset
    for number, line in enumerate(stream, start=start.record + 1):
        offset += len(line)
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        yield _checked(parse_record(line, where), columns, where), Cursor(start.file, number, offset)


def parse_record(line: str | bytes, where: str) -> dict[str, Any]:
    """Parses a line of JSON (`UserError` if it is no object); `where` is its origin, for messages."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object but {type(record).__name__}")
    return record


def _read_text(stream: io.BufferedReader, path: str, columns: list[str], start: Cursor) -> _Records:
    """Documents of at most `MAX_TEXT_DOCUMENT` bytes, cut at a blank line, else at a line's end, else anywhere."""
    _skip(stream, start.offset)
    number, offset, rest = start.record, start.offset, b""
    while True:
        rest += stream.read(MAX_TEXT_DOCUMENT + 1 - len(rest))
        if not rest:
            return
        size = _cut(rest)
        try:
            text = rest[:size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {offset + error.start} ({error.reason})") from error
        number, offset, rest = number + 1, offset + size, rest[size:]
        yield {columns[0]: text}, Cursor(start.file, number, offset)


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


def _read_parquet(
    filesystem: Any, path: str, size: int, columns: list[str], start: Cursor, every_field: bool
) -> Iterator[Block]:
    import pyarrow
    from pyarrow import parquet

    with _open(filesystem, path) as raw:
        try:
            # With a buffer the pages of a row group are read one by one, not all at once.
            file = parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a whole parquet file ({error})") from error
        names = file.schema_arrow.names
        if missing := [column for column in columns if column not in names]:
            raise UserError(f"{path}: no column {missing[0]!r} among {names}; name one with --text_column or --where")
        rows = max(1, file.metadata.num_rows)
        records = _parquet_records(file, path, columns, start, None if every_field else list(dict.fromkeys(columns)))
        yield from _grouped(records, columns[0], start, lambda cursor: size * cursor.record // rows, size)


def _parquet_records(file: Any, path: str, columns: list[str], start: Cursor, wanted: list[str] | None) -> _Records:
    row = group = 0
    while group < file.num_row_groups and row + file.metadata.row_group(group).num_rows <= start.record:
        row += file.metadata.row_group(group).num_rows
        group += 1
    # Few rows at a time, as a file does not tell how long its rows are.
    for batch in file.iter_batches(batch_size=64, row_groups=range(group, file.num_row_groups), columns=wanted):
        values = (column.to_pylist() for column in batch.columns)  # many times faster than the batch's own to_pylist
        for cells in zip(*values, strict=True):
            row += 1
            if row > start.record:
                record = dict(zip(batch.schema.names, cells, strict=True))
                yield _checked(record, columns, f"{path}, row {row}"), Cursor(start.file, row)


def _checked(record: dict[str, Any], columns: list[str], where: str) -> dict[str, Any]:
    if missing := [column for column in columns if column not in record]:
        names = f"among {list(record)}; name one with --text_column or --where"
        raise UserError(f"{where}: no field {missing[0]!r} {names}")
    text = record[columns[0]]
    if text is None:
        return {**record, columns[0]: ""}
    if not isinstance(text, str):
        raise UserError(f"{where}: field {columns[0]!r} is not text but {type(text).__name__}")
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise UserError(f"{where}: field {columns[0]!r} is not text ({error})") from error
    return record

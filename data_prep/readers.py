"""Records out of files, a block at a time, from any place on: parquet, JSON lines and plain text."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.cli import UserError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# A plain .json is rarely lines of records, and other programs leave such files beside the data.
SUFFIXES = (
    *(".parquet", ".jsonl", ".txt"),
    *(kind + packed for kind in (".jsonl", ".json", ".txt") for packed in COMPRESSED),
)
BLOCK_BYTES = 1 << 20  # of text that are read at a time
MAX_TEXT_DOCUMENT = 64 * 1024  # bytes; a longer text file is read as several documents
_REMOTE_READ_BYTES = 32 << 20


@dataclass(frozen=True)
class Cursor:
    """A place in a corpus: the next record to read.

    Attributes:
        file: its number in the corpus.
        record: records of that file before it.
        offset: bytes of that file before it, after decompression; 0 in parquet, whose rows are found by number.
    """

    file: int = 0
    record: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Block:
    """What lies between two cursors: records as read, texts once their column has been taken.

    Attributes:
        size: how much of the corpus's files this is, in bytes.
    """

    texts: list[Any]
    start: Cursor
    stop: Cursor
    size: int


def read_file(
    filesystem: Any, path: str, size: int, columns: list[str], start: Cursor, every_field: bool = False
) -> Iterator[Block]:
    """The records of a file from `start` on: dictionaries with `columns`, the first of which is text.

    Args:
        filesystem: of `fsspec`, to which `path` belongs.
        size: of the file, in bytes.
        every_field: give the other fields as well, where the format could leave them unread.

    Raises:
        UserError: for what is not the format that the name says, a record without one of the columns, or with
            something else than text in the first.
    """
    if path.endswith(".parquet"):
        yield from _read_parquet(filesystem, path, size, columns, start, every_field)
        return
    read = _read_text if ".txt" in path[-8:] else _read_jsonl
    with _open(filesystem, path) as raw:
        yield from _grouped(read(_decompressed(raw, path), path, columns, start), start, raw, size)


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
    return io.BufferedReader(stream, BLOCK_BYTES)


def _grouped(records: Iterator[tuple[dict[str, Any], Cursor]], start: Cursor, raw: Any, size: int) -> Iterator[Block]:
    """Blocks of the records, each of which comes with the cursor behind it."""
    group: list[dict[str, Any]] = []
    before = 0
    stop = start
    for record, stop in records:
        group.append(record)
        if stop.offset - start.offset >= BLOCK_BYTES:
            yield Block(group, start, stop, raw.tell() - before)
            group, start, before = [], stop, raw.tell()
    if group:
        yield Block(group, start, stop, size - before)


def _skip(stream: io.BufferedReader, count: int) -> None:
    while count > 0 and (read := len(stream.read(min(count, BLOCK_BYTES)))):
        count -= read


def _read_jsonl(
    stream: io.BufferedReader, path: str, columns: list[str], start: Cursor
) -> Iterator[tuple[dict[str, Any], Cursor]]:
    _skip(stream, start.offset)
    number, offset = start.record, start.offset
    for line in stream:
        number, offset = number + 1, offset + len(line)
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object but {type(record).__name__}")
        yield _checked(record, columns, path, "line", number), Cursor(start.file, number, offset)


def _read_text(
    stream: io.BufferedReader, path: str, columns: list[str], start: Cursor
) -> Iterator[tuple[dict[str, Any], Cursor]]:
    """Pieces of at most `MAX_TEXT_DOCUMENT` bytes, cut at a blank line, else at a line's end, else anywhere."""
    _skip(stream, start.offset)
    number, offset, rest = start.record, start.offset, b""
    while True:
        rest += stream.read(MAX_TEXT_DOCUMENT + 1 - len(rest))
        if not rest:
            return
        piece = rest[: _cut(rest)]
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {offset + error.start} ({error.reason})") from error
        rest = rest[len(piece) :]
        number, offset = number + 1, offset + len(piece)
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
            # With a buffer a row group's pages are read one by one, not all at once.
            file = parquet.ParquetFile(raw, buffer_size=BLOCK_BYTES)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a whole parquet file ({error})") from error
        names = file.schema_arrow.names
        if missing := [column for column in columns if column not in names]:
            raise UserError(f"{path}: no column {missing[0]!r} among {names}; name one with --text_column or --where")
        row, first_group = 0, 0
        while first_group < file.num_row_groups and row + file.metadata.row_group(first_group).num_rows <= start.record:
            row += file.metadata.row_group(first_group).num_rows
            first_group += 1
        batches = file.iter_batches(
            batch_size=_rows_of_a_block(file.metadata, columns[0]),
            row_groups=range(first_group, file.num_row_groups),
            columns=None if every_field else list(dict.fromkeys(columns)),
        )
        for batch in batches:
            skipped = max(0, start.record - row)
            first, row = row, row + len(batch)
            if skipped >= len(batch):
                continue
            records = [
                _checked(record, columns, path, "row", number)
                for number, record in enumerate(_rows(batch.slice(skipped)), start=first + skipped + 1)
            ]
            yield Block(
                records,
                Cursor(start.file, first + skipped),
                Cursor(start.file, row),
                size * len(records) // file.metadata.num_rows,
            )


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    columns = (column.to_pylist() for column in batch.columns)  # many times quicker than the batch's own to_pylist
    return (dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True))


def _rows_of_a_block(metadata: Any, column: str) -> int:
    """So many rows that their text is about `BLOCK_BYTES`, judged by the row group whose rows are the longest."""
    longest = 1.0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for i in range(group.num_columns):
            chunk = group.column(i)
            if chunk.path_in_schema == column and group.num_rows:
                longest = max(longest, chunk.total_uncompressed_size / group.num_rows)
    return max(1, min(4096, int(BLOCK_BYTES / longest)))


def _checked(record: dict[str, Any], columns: list[str], path: str, kind: str, number: int) -> dict[str, Any]:
    for column in columns:
        if column not in record:
            raise UserError(
                f"{path}, {kind} {number}: no field {column!r} among {list(record)}; "
                f"name one with --text_column or --where"
            )
    text = record[columns[0]]
    if text is None:
        return {**record, columns[0]: ""}
    if not isinstance(text, str):
        raise UserError(f"{path}, {kind} {number}: field {columns[0]!r} is not text but {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
            raise UserError(f"{path}, {kind} {number}: field {columns[0]!r} is not text ({error})") from error
    return record

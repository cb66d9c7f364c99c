"""Documents of a source, a block at a time, from any position."""

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import UserError, listed, redact
from data_prep.common.hub import Retries, is_transient
from data_prep.common.schema import read_json
from data_prep.sources import formats
from data_prep.sources.fields import Fields
from data_prep.sources.files import CLEANING_CONFIG, CLEANING_REPORT
from data_prep.sources.formats import Block, blocks_of, is_plain_text, suffixes
from data_prep.sources.source import CleaningStep, Position, Source, SourceRecord

# Seconds before each new attempt if the network fails.
RETRY_DELAYS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)


@dataclass(frozen=True)
class Corpus:
    """What a source consists of: files that are read one after another.

    Attributes:
        commit: of the data set on the Hub.
        sizes: of the files, in bytes.
        filesystem: of `fsspec`.
        builder: of `datasets`, for files in a format that is not read here.
        not_read: number of files beside them that are not read, by suffix.
        bad_files: files that could not be read so far, with the reason, if they are skipped; None if they are an error.
    """

    source: Source
    commit: str | None
    paths: Sequence[str]
    sizes: Sequence[int]
    filesystem: Any
    builder: Any = None
    not_read: dict[str, int] = field(default_factory=dict)
    bad_files: dict[str, str] | None = None

    def __post_init__(self) -> None:
        for path, size in zip(self.paths, self.sizes, strict=True):
            if size is None:
                raise UserError(f"{path}: its server does not say how large it is; download it first")
            if is_plain_text(path) and (self.source.where or self.source.kind != "text"):
                raise UserError(f"{path}: plain text has no columns for --where, token ids or conversations")

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.sizes)

    def bytes_before(self, start: Position) -> int | None:
        """Size of the files before a position; None if the sizes of blocks are not known."""
        return sum(self.sizes[: start.file]) if self.builder is None else None

    @property
    def is_local(self) -> bool:
        """Whether it is read without a network."""
        return "file" in self.filesystem.protocol

    @cached_property
    def fields(self) -> Fields:
        """Fields that are read of each record."""
        return Fields(self.source)

    def describe(self) -> SourceRecord:
        """The manifest's record of the source; a change of its files' names or sizes changes it."""
        names = "".join(f"{path.rpartition('/')[2]} {n}\n" for path, n in zip(self.paths, self.sizes, strict=True))
        return SourceRecord(
            **self.source.describe(),
            commit=self.commit,
            files=len(self.paths),
            bytes=self.bytes,
            names_and_sizes=hashlib.sha256(os.fsencode(names)).hexdigest(),
        )

    def part(self, number: int, count: int) -> "Corpus":
        """One of `count` parts of whole files, which together have all documents."""
        return replace(self, paths=self.paths[number::count], sizes=self.sizes[number::count])

    def cleaning(self) -> list[CleaningStep]:
        """Report of `data_prep.clean`, in the files' folder or its parent; empty if another program wrote the files."""
        folder = Path(self.paths[0]).parent
        for candidate in (folder, folder.parent) if self.is_local else ():
            if (candidate / CLEANING_CONFIG).is_file() and (candidate / CLEANING_REPORT).is_file():
                try:
                    return read_json(candidate / CLEANING_REPORT, list[CleaningStep])
                except UserError as error:
                    print(f"not taken for a report of data_prep.clean: {error}", file=sys.stderr)
        return []

    def records(self) -> Iterator[dict[str, Any]]:
        """All records with all fields, including records without text. Raises as `blocks`."""
        for block in self._read(Position(), RETRY_DELAYS, every_field=True):
            yield from filter(self.fields.selects, block.texts)

    def documents(self) -> Iterator[Any]:
        """All documents."""
        for block in self.blocks(Position()):
            yield from block.texts

    def blocks(self, start: Position, retry_delays: Sequence[float] = RETRY_DELAYS) -> Iterator[Block]:
        """Non-empty documents from `start` on, in a fixed order, a few megabytes at a time.

        Args:
            retry_delays: seconds before each new attempt after the network failed; a block resets them.

        Raises:
            UserError: for a file or record that cannot be read, and once all delays are used.
        """
        for block in self._read(replace(start, tokens=0), retry_delays, every_field=False):
            found = (record[self.source.column] for record in block.texts if self.fields.selects(record))
            yield replace(block, texts=[document for document in found if not _is_empty(document)])

    def _read(self, start: Position, delays: Sequence[float], every_field: bool) -> Iterator[Block]:
        if start.file > 0 and start.file >= len(self.paths):
            raise UserError(f"preparation continues in file {start.file} of {len(self.paths)}; prepare a new folder")
        retries = Retries(delays, "the same command goes on from the last finished shard")
        while start.file < len(self.paths):
            path = self.paths[start.file]
            try:
                for block in self._read_file(start, every_field):
                    yield block
                    start, retries.failures = block.stop, 0
            except Exception as error:
                if self.bad_files is not None and not is_transient(error):
                    self._list_bad_file(self.bad_files, path, error)
                elif isinstance(error, UserError):
                    raise
                else:
                    retries.wait(path, error)
                    continue
            start = Position(file=start.file + 1)

    def _read_file(self, start: Position, every_field: bool) -> Iterator[Block]:
        """Records of a file from a position on, with other fields than the wanted ones if `every_field` and the format
        has them."""
        path, fields = self.paths[start.file], self.fields
        if self.builder is not None:
            records = formats.streamed(self.builder, formats.url_of(self.filesystem, path), fields.document)
            yield from blocks_of(formats.after(records, start.record), fields, start, f"{path}, record")
            return
        with formats.open_file(self.filesystem, path) as raw:
            if suffixes(path)[0] == ".parquet":
                size = self.sizes[start.file]
                records, unit = formats.parquet_rows(raw, path, size, fields, start.record, every_field), "row"
            elif is_plain_text(path):
                records, unit = formats.after(formats.texts(raw, path, fields.document), start.record), "document"
            else:
                records, unit = formats.json_lines(raw, path, start.record), "line"
            yield from blocks_of(records, fields, start, f"{path}, {unit}")

    def _list_bad_file(self, bad_files: dict[str, str], path: str, error: Exception) -> None:
        folder = os.path.commonpath(map(os.path.dirname, self.paths)) + "/"
        name, reason = path.removeprefix(folder), " ".join(str(error).split()) or type(error).__name__
        reason = redact(reason.replace(folder, "").removeprefix(name).lstrip(":, "))
        # Names may have bytes that are no text.
        bad_files[redact(name).encode("utf-8", "replace").decode()] = reason.encode("utf-8", "replace").decode()


def files_read(count: int, not_read: dict[str, int], bad_files: dict[str, str]) -> str:
    """Says how many of a source's `count` files are read, and how many of those and of others are not.

    Args:
        not_read: number of other files, by suffix.
        bad_files: files that cannot be read to their end, with the reason.
    """
    kinds = [f"{number:,} {kind}" for kind, number in not_read.items()]
    if bad_files:
        kinds.append(f"{len(bad_files):,} bad: {listed([f'{name} ({why})' for name, why in bad_files.items()])}")
    total = sum(not_read.values()) + len(bad_files)
    return f"{count - len(bad_files):,} files read" + (f", {total:,} not: {', '.join(kinds)}" if kinds else "")


def _is_empty(document: "str | np.ndarray") -> bool:
    return document.isspace() or not document if isinstance(document, str) else not len(document)

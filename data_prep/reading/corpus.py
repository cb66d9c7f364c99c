"""Documents of a source, a block at a time, from any position."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.common.command_line import listed
from data_prep.common.records import CleaningStep, SourceRecord
from data_prep.common.retries import Retries
from data_prep.reading.conditions import Condition
from data_prep.reading.fields import Fields
from data_prep.reading.readers import Block, Cursor

if TYPE_CHECKING:
    from data_prep.reading.sources import Source

# Seconds before each new attempt if the network fails.
RETRY_DELAYS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)


class ReadError(Exception):
    """A path, and the error of reading it."""


@dataclass(frozen=True)
class Corpus(ABC):
    """What a source consists of, in reading order.

    Attributes:
        commit: of the data set on the Hub.
        paths, sizes: of the files, as far as they are known; sizes in bytes.
        is_local: it is read without a network.
        not_read: number of files beside them that are not read, by suffix.
        bad_files: files that could not be read so far, with the reason, if they are skipped; None if they are an error.
    """

    source: "Source"
    conditions: tuple[Condition, ...]
    commit: str | None
    paths: Sequence[str]
    sizes: Sequence[int]
    is_local: bool
    not_read: dict[str, int] = field(default_factory=dict, kw_only=True)
    bad_files: dict[str, str] | None = field(default=None, kw_only=True)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.sizes)

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

    @abstractmethod
    def part(self, number: int, count: int) -> "Corpus":
        """One of `count` parts, which together have all documents."""

    @abstractmethod
    def _read_from(self, start: Cursor, every_field: bool) -> Iterator[Block]:
        """Blocks of records, with other fields than the wanted ones if `every_field` and the format has them. A failed
        request is a `ReadError`."""

    def bytes_before(self, start: Cursor) -> int | None:
        """Size of the files before a position; None if the sizes of blocks are not known."""
        return sum(self.sizes[: start.file])

    def cleaning(self) -> list[CleaningStep]:
        """Report of `data_prep.clean`; empty if another program wrote the source."""
        return []

    @property
    def fields(self) -> Fields:
        """Fields that are read of each record."""
        others = tuple(condition.column for condition in self.conditions)
        return Fields(self.source.column, others, self.source.kind)

    def records(self) -> Iterator[dict[str, Any]]:
        """All records with all fields, including records without text. Raises as `blocks`."""
        for block in self._retried(Cursor(), RETRY_DELAYS, every_field=True):
            yield from filter(self._keeps, block.texts)

    def documents(self) -> Iterator[Any]:
        """All documents."""
        for block in self.blocks(Cursor()):
            yield from block.texts

    def blocks(self, start: Cursor, retry_delays: Sequence[float] = RETRY_DELAYS) -> Iterator[Block]:
        """Non-empty documents from `start` on, in a fixed order, a few megabytes at a time.

        Args:
            retry_delays: seconds before each new attempt after the network failed; a block resets them.

        Raises:
            UserError: for a file or record that cannot be read, and once all delays are used.
        """
        for block in self._retried(start, retry_delays, every_field=False):
            found = (record[self.source.column] for record in block.texts if self._keeps(record))
            yield replace(block, texts=[document for document in found if not _is_empty(document)])

    def _retried(self, start: Cursor, delays: Sequence[float], every_field: bool) -> Iterator[Block]:
        retries = Retries(delays, "the same command goes on from the last finished shard")
        while True:
            try:
                for block in self._read_from(start, every_field):
                    yield block
                    start = block.stop
                    retries.failures = 0
                return
            except ReadError as error:
                retries.wait(*error.args)

    def _keeps(self, record: dict[str, Any]) -> bool:
        return all(condition.holds(record) for condition in self.conditions)


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

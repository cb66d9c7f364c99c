"""A block of records at a time, from any position: what all formats have in common."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.common.command_line import UserError
from data_prep.reading.fields import BadRecord

BLOCK_CHARACTERS = 1 << 20
_RECORD_CHARACTERS = 16  # size of a record beside its text


@dataclass(frozen=True)
class Cursor:
    """Position in a corpus: the next record to read.

    Attributes:
        file: index of the file.
        record: number of records before it in the file.
        offset: number of decompressed bytes before it in the file; 0 in parquet, whose rows are found by number.
        state: of a stream of `datasets`.
    """

    file: int = 0
    record: int = 0
    offset: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Block:
    """Records, or their documents, between two cursors; `size` is the number of bytes of the corpus's files."""

    texts: list[Any]
    start: Cursor
    stop: Cursor
    size: int


class Reader(ABC):
    """Records from a position on, each with a valid document in its first field."""

    @abstractmethod
    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Reads the records, which `Fields.check` has seen; its error is that of the record `where()`."""

    @abstractmethod
    def where(self) -> str:
        """Names the record that was read last."""

    @abstractmethod
    def cursor(self) -> Cursor:
        """The position after the record that was read last."""

    @abstractmethod
    def bytes_read(self) -> int:
        """Bytes of the file before that position, about."""

    def blocks(self, document: str) -> Iterator[Block]:
        """Groups of records with about `BLOCK_CHARACTERS` characters, or ids, in the field `document` (`UserError` for
        a record that `Fields.check` refuses)."""
        try:
            yield from self._blocks(document)
        except BadRecord as error:
            raise UserError(f"{self.where()}: {error}") from error

    def _blocks(self, document: str) -> Iterator[Block]:
        group: list[dict[str, Any]] = []
        size, start, before = 0, self.cursor(), self.bytes_read()
        for record in self:
            group.append(record)
            size += len(record[document]) + _RECORD_CHARACTERS
            if size >= BLOCK_CHARACTERS:
                stop, read = self.cursor(), self.bytes_read()
                yield Block(group, start, stop, read - before)
                group, size, start, before = [], 0, stop, read
        if group:
            yield Block(group, start, self.cursor(), self.bytes_read() - before)

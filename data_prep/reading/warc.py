"""Reads pages of WARC and WET files, as Common Crawl publishes them; datatrove takes the page out of a record."""

import os
from collections.abc import Iterator
from typing import Any

from data_prep.common.command_line import UserError, first_line
from data_prep.reading.compression import suffixes
from data_prep.reading.fields import BadRecord, Fields
from data_prep.reading.readers import Cursor, Reader

WARC_SUFFIXES = (".warc", ".wet")


class WarcReader(Reader):
    """Pages in HTML, or the text of WET files, with the fields text, id, url and date.

    A position is the place of a record in the file itself, where reading goes on without what is before it.
    """

    def __init__(self, raw: Any, path: str, fields: Fields, start: Cursor) -> None:
        from warcio.archiveiterator import WARCIterator

        self.size = raw.seek(0, os.SEEK_END)
        raw.seek(start.offset)
        self.path, self.fields, self.records = path, fields, WARCIterator(raw)
        self.file, self.record = start.file, start.record

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from datatrove.pipeline.readers.warc import process_record
        from warcio.exceptions import ArchiveLoadFailed
        from warcio.statusandheaders import StatusAndHeadersParserException

        try:
            for record in self.records:
                self.record += 1
                if record.length is None:
                    raise BadRecord("its header is not whole")
                page = process_record(record)
                self.records.read_to_end()  # then its offset is that of the next record
                if record.raw_stream.limit:
                    raise BadRecord("the file ends within it")
                if page is not None:
                    yield self.fields.check(page)
            if self.records.offset < self.size:
                raise BadRecord("the file ends within the next one")
        # warcio and datatrove take for granted what a header that is cut lacks.
        except (ArchiveLoadFailed, StatusAndHeadersParserException, AttributeError, KeyError) as error:
            raise UserError(f"{self.path}, after record {self.record}: not WARC ({first_line(error)})") from error

    def where(self) -> str:
        return f"{self.path}, record {self.record}"

    def cursor(self) -> Cursor:
        return Cursor(self.file, self.record, self.records.offset)

    def bytes_read(self) -> int:
        return self.records.offset


def is_warc(path: str) -> bool:
    """Whether a file is WARC or WET, by its name."""
    return suffixes(path)[0] in WARC_SUFFIXES


def check_packages() -> None:
    """Raises a `UserError` if what reads WARC is not installed."""
    try:
        import cchardet  # noqa: F401
        import datatrove  # noqa: F401
        import magic  # noqa: F401
        import warcio  # noqa: F401
    except ImportError as error:  # magic also raises it if the system has no libmagic
        command = 'pip install -e ".[web]" -c constraints.txt'
        raise UserError(f"WARC files need `{command}` ({first_line(error)})") from error

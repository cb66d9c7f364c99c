"""A corpus of files in formats that are read here, local or of any `fsspec` protocol."""

import os
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.command_line import UserError, redact
from data_prep.common.records import CleaningStep
from data_prep.common.retries import is_transient
from data_prep.common.schema import read_json
from data_prep.reading.conditions import Condition
from data_prep.reading.corpus import Corpus, ReadError
from data_prep.reading.formats import is_plain_text, is_read_here, read_file
from data_prep.reading.readers import Block, Cursor
from data_prep.reading.warc import check_packages, is_warc

if TYPE_CHECKING:
    from data_prep.reading.sources import Source

# Files in the output of data_prep.clean: from the start on, and once it is complete.
CLEANING_CONFIG, CLEANING_REPORT = "config.json", "cleaning.json"


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """Files that are read one after another, of `fsspec`'s `filesystem`."""

    filesystem: Any

    def __post_init__(self) -> None:
        for path, size in zip(self.paths, self.sizes, strict=True):
            if size is None:
                raise UserError(f"{path}: its server does not say how large it is; download it first")
            if is_plain_text(path) and (self.conditions or self.source.kind != "text"):
                raise UserError(f"{path}: plain text has no columns for --where, token ids or conversations")
        if any(map(is_warc, self.paths)):
            check_packages()

    def cleaning(self) -> list[CleaningStep]:
        """From the files' folder or its parent."""
        if not self.is_local:
            return []
        folder = Path(self.paths[0]).parent
        for candidate in (folder, folder.parent):
            if (candidate / CLEANING_CONFIG).is_file() and (candidate / CLEANING_REPORT).is_file():
                try:
                    return read_json(candidate / CLEANING_REPORT, list[CleaningStep])
                except UserError as error:
                    print(f"not taken for a report of data_prep.clean: {error}", file=sys.stderr)
        return []

    def part(self, number: int, count: int) -> "FileCorpus":
        """As in `Corpus`, of whole files."""
        return replace(self, paths=self.paths[number::count], sizes=self.sizes[number::count])

    def _read_from(self, start: Cursor, every_field: bool) -> Iterator[Block]:
        if start.state is not None:
            raise UserError("preparation began when `datasets` read this format; prepare a new folder")
        if start.file > 0 and start.file >= len(self.paths):
            raise UserError(f"preparation continues in file {start.file} of {len(self.paths)}; prepare a new folder")
        for number in range(start.file, len(self.paths)):
            cursor = start if number == start.file else Cursor(file=number)
            path = self.paths[number]
            try:
                yield from read_file(self.filesystem, path, self.sizes[number], self.fields, cursor, every_field)
            except Exception as error:
                if self.bad_files is not None and not is_transient(error):
                    self._list_bad_file(path, error)
                elif isinstance(error, UserError):
                    raise
                else:
                    raise ReadError(path, error) from error

    def _list_bad_file(self, path: str, error: Exception) -> None:
        folder = os.path.commonpath(map(os.path.dirname, self.paths)) + "/"
        name, reason = path.removeprefix(folder), " ".join(str(error).split()) or type(error).__name__
        reason = redact(reason.replace(folder, "").removeprefix(name).lstrip(":, "))
        assert self.bad_files is not None
        # Names may have bytes that are no text.
        self.bad_files[redact(name).encode("utf-8", "replace").decode()] = reason.encode("utf-8", "replace").decode()


def corpus_of_files(
    source: "Source", conditions: tuple[Condition, ...], filesystem: Any, paths: Sequence[str]
) -> FileCorpus:
    """The corpus of files that are read here. Raises a `UserError` for a file that cannot be read."""
    is_local, skips = "file" in filesystem.protocol, source.on_bad_file == "skip"
    for name in paths if is_local and not skips else ():  # reading a pipe or a device may never end
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise UserError(f"{name}: not a regular file; name a file, or a folder of files")
    sizes = [0 if skips and not filesystem.exists(path) else filesystem.size(path) for path in paths]
    return FileCorpus(source, conditions, None, paths, sizes, is_local, filesystem)


def names_files(source: str) -> bool:
    """Whether a source is a path or a pattern rather than the name `OWNER/NAME` of a data set."""
    return (
        "://" in source
        or source.startswith(("/", ".", "~"))
        or is_read_here(source)
        or any(c in source for c in "*?[")
        or source.count("/") != 1
        or Path(source).exists()
    )

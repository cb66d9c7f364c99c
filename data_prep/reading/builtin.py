"""The built-in corpus: the sources of the Python standard library, so that nothing has to be downloaded."""

import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import UserError
from data_prep.reading.corpus import Corpus
from data_prep.reading.readers import Block, Cursor

if TYPE_CHECKING:
    from data_prep.reading.sources import Source

_BLOCK_CHARACTERS = 1 << 20


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def standard_library_files() -> list[Path]:
    """Its sources without its character tables, in order."""
    root, skipped = standard_library(), {"site-packages", "dist-packages", "encodings", "pydoc_data"}
    return sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))


@dataclass(frozen=True)
class BuiltinCorpus(Corpus):
    """The sources of the standard library."""

    @classmethod
    def find(cls, source: "Source") -> "BuiltinCorpus":
        """Finds the files (`UserError` if there are none)."""
        if not (files := standard_library_files()):
            where = standard_library()
            raise UserError(f"the built-in corpus is empty: no Python sources in {where}; give another --source")
        return cls(source, (), None, list(map(str, files)), [path.stat().st_size for path in files], True)

    def part(self, number: int, count: int) -> "BuiltinCorpus":
        """As in `Corpus`; all is in the first part."""
        return self if number == 0 else replace(self, paths=[], sizes=[])

    def _read_from(self, start: Cursor, every_field: bool) -> Iterator[Block]:
        """Distinct texts in a fixed random order, so that any stretch is a sample of the whole corpus."""
        distinct = list(dict.fromkeys(Path(path).read_text(encoding="utf-8", errors="ignore") for path in self.paths))
        texts = [text for text in random.Random(0).sample(distinct, len(distinct)) if text.strip()]
        first = start.record
        while first < len(texts):
            stop, size = first, 0
            while stop < len(texts) and size < _BLOCK_CHARACTERS:
                size += len(texts[stop])
                stop += 1
            records = [{self.source.column: text} for text in texts[first:stop]]
            yield Block(records, Cursor(record=first), Cursor(record=stop), size)
            first = stop

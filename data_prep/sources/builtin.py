"""The built-in corpus: the sources of the Python standard library, so that nothing has to be downloaded."""

import ast
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

from data_prep.common.command_line import UserError
from data_prep.sources.corpus import Corpus
from data_prep.sources.formats import Block, blocks_of
from data_prep.sources.source import Position, Source


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
    def find(cls, source: Source) -> "BuiltinCorpus":
        """Finds the files (`UserError` if there are none)."""
        from fsspec.implementations.local import LocalFileSystem

        if not (files := standard_library_files()):
            where = standard_library()
            raise UserError(f"the built-in corpus is empty: no Python sources in {where}; give another --source")
        return cls(source, None, list(map(str, files)), [path.stat().st_size for path in files], LocalFileSystem())

    def part(self, number: int, count: int) -> "BuiltinCorpus":
        """As in `Corpus`; all is in the first part."""
        return self if number == 0 else replace(self, paths=[], sizes=[])

    def _read_file(self, start: Position, every_field: bool) -> Iterator[Block]:
        """All distinct texts in a fixed random order, so that any stretch is a sample of the whole corpus."""
        if start.file > 0:
            return
        distinct = list(dict.fromkeys(Path(path).read_text(encoding="utf-8", errors="ignore") for path in self.paths))
        texts = [text for text in random.Random(0).sample(distinct, len(distinct)) if text.strip()]
        sizes = accumulate(map(len, texts))
        records = (({self.source.column: text}, size) for text, size in zip(texts, sizes, strict=True))
        yield from blocks_of(islice(records, start.record, None), self.fields, start, "text")


Conversation = list[dict[str, str]]
_SHORTEST, _LONGEST = 20, 160  # characters of an answer
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}


def docstring_conversations(count: int = 800) -> list[Conversation]:
    """At most `count` conversations, the same in each call: what a function or class is for, and how to call it.
    Nothing is imported."""
    found = list(_conversations())
    return random.Random(0).sample(found, min(count, len(found)))


def _conversations() -> Iterator[Conversation]:
    for path in standard_library_files():
        parts = path.relative_to(standard_library()).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if _SKIPPED.intersection(parts) or any(part.startswith("_") for part in parts):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8", errors="ignore")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            name = ".".join([*parts, node.name])
            turns = {f"What does {name} do?": " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())}
            if isinstance(node, ast.FunctionDef):
                turns["How do I call it?"] = f"{name}({ast.unparse(node.args)})"
            if all(_SHORTEST <= len(answer) < _LONGEST for answer in turns.values()):
                yield [
                    {"role": role, "content": text}
                    for turn in turns.items()
                    for role, text in zip(("user", "assistant"), turn, strict=True)
                ]

"""Texts of evaluation sets, which must not be in the training data."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text
from data_prep.reading.formats import parse_record

SUFFIXES = (".jsonl", ".txt")
_HELLASWAG = ["ctx", "endings"]


def read_items(path: Path, fields: list[str] | None = None) -> Iterator[list[str]]:
    """Reads the items of an evaluation file, each as the texts whose presence in the data is a leak.

    An item is a paragraph of a .txt file, or a record of a .jsonl file. With `fields`, its texts are these fields one
    after another, once for each choice in a field that lists choices: a question followed by each answer. Without,
    HellaSwag's `ctx` and `endings` are used if present, else every string of the record is a text. Raises a `UserError`
    for a file that cannot be read, and a record without one of `fields`.
    """
    text = read_text(path)
    if path.suffix == ".txt":
        yield from ([paragraph] for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())
        return
    # Not splitlines, which also splits at separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _texts(parse_record(line, where), fields, where)


def _texts(record: dict[str, Any], fields: list[str] | None, where: str) -> list[str]:
    if fields is None and not all(name in record for name in _HELLASWAG):
        return [text for value in record.values() for text in _strings(value)]
    parts = []
    for name in fields or _HELLASWAG:
        if not (strings := _strings(record.get(name))):
            raise UserError(f"{where}: no text in a field {name!r} among {list(record)}; name others with fields")
        parts.append(strings)
    return [" ".join(choice) for choice in itertools.product(*parts)]


def _strings(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]

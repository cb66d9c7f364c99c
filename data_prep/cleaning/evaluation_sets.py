"""The texts of evaluation sets: what must not be in the training data."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text

SUFFIXES = (".jsonl", ".txt")
_HELLASWAG = ["ctx", "endings"]


def read_items(path: Path, fields: list[str] | None = None) -> Iterator[list[str]]:
    """The items of an evaluation file, each as the texts that would betray it.

    A .txt file has an item in each paragraph. In a .jsonl file an item is a record. With `fields`, its text is these
    fields one after another, and a field that lists choices gives a text for each of them: a question followed by each
    answer. Without, HellaSwag's `ctx` and `endings` are recognized; of other records every string is a text of its own.

    Raises:
        UserError: for a file that cannot be read, and a record without one of `fields`.
    """
    text = read_text(path)
    if path.suffix == ".txt":
        yield from ([paragraph] for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())
        return
    # Not splitlines: it would also split at the separators that JSON leaves unescaped within strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _texts(_record(line, f"{path}, line {number}"), fields, f"{path}, line {number}")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object but {type(record).__name__}")
    return record


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
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]

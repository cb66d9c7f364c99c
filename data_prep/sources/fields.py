"""The fields of a record that are read: text, ids of tokens or a conversation, and those of `--where`."""

import ast
import operator
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.sources.source import Source

ROLES = ("system", "user", "assistant")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "in": lambda value, allowed: value in allowed,
}


class BadRecord(Exception):
    """What is wrong with a record, without its place."""


@dataclass(frozen=True)
class Condition:
    """Condition on a column, or on a field in one: `int_score >= 3`, `lang in ['en', 'de']`, `meta.language == en`."""

    column: str
    comparison: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parses `COLUMN OPERATOR VALUE` (`UserError` for other text); a value is a Python literal, else a string."""
        match = re.fullmatch(r"\s*([\w.-]+?)\s*(==|!=|>=|<=|>|<|\bin\b)\s*(.+?)\s*", text)
        if match is None:
            raise UserError(f"--where {text!r}: expected COLUMN OPERATOR VALUE, with one of {', '.join(_OPERATORS)}")
        try:
            value = ast.literal_eval(match[3])
        except (ValueError, SyntaxError):
            value = match[3]
        if match[2] == "in" and not isinstance(value, list | tuple | set):
            raise UserError(f"--where {text!r}: `in` takes a list, as in \"language in ['en', 'de']\"")
        return cls(match[1], match[2], value)

    def holds(self, record: dict[str, Any]) -> bool:
        """Whether a record satisfies the condition (`UserError` if the column cannot be compared); null never does."""
        found = _find(record, self.column)
        try:
            return found is not None and bool(_OPERATORS[self.comparison](found, self.value))
        except TypeError as error:
            raise UserError(f"--where {self.column} {self.comparison} {self.value!r}: {error}") from error


def _find(record: dict[str, Any], column: str) -> Any:
    """The value of a column, or of `column.field` in one; None for a field that is not there."""
    if column in record:
        return record[column]
    first, _, rest = column.partition(".")
    inside = record.get(first)
    return _find(inside, rest) if isinstance(inside, dict) and rest else None


class Fields:
    """Fields that are read of each record: the one that holds the document, and those of conditions.

    Attributes:
        names: each once; `column.field` is a field in a column.
    """

    def __init__(self, source: Source) -> None:
        self.document, self.kind = source.column, source.kind
        self.conditions = list(map(Condition.parse, source.where))
        self.names = list(dict.fromkeys([self.document, *(condition.column for condition in self.conditions)]))

    def check_names(self, found: Collection[str]) -> None:
        """Refuses a record, or a file, without one of the fields (`BadRecord`)."""
        for name in self.names:
            if name not in found and (name == self.document or name.partition(".")[0] not in found):
                options = "messages_column" if self.kind == "messages" else "text_column, --tokens_column or --where"
                raise BadRecord(f"no field {name!r} among {list(found)}; name one with --{options}")

    def values(self, name: str, column: Any) -> Sequence[Any]:
        """The values of a column of arrow's; lists of ids without copying each id to Python."""
        from pyarrow import types

        is_list = types.is_list(column.type) or types.is_large_list(column.type)
        if self.kind == "tokens" and name == self.document and is_list and not column.null_count:
            return [cell.values.to_numpy(zero_copy_only=False) for cell in column]
        return column.to_pylist()  # many times faster than a batch's own to_pylist

    def check(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with a valid document, an empty one if it was null (`BadRecord` for one without one of the
        fields, and a document of another kind)."""
        self.check_names(record)
        document, field = record[self.document], f"field {self.document!r}"
        if self.kind == "messages":
            record[self.document] = _messages(document, field)
        elif self.kind == "tokens":
            record[self.document] = _ids(document, field)
        elif document is None:
            record[self.document] = ""
        else:
            _check_text(document, field)
        return record

    def selects(self, record: dict[str, Any]) -> bool:
        """Whether a record satisfies all conditions."""
        return all(condition.holds(record) for condition in self.conditions)


def _check_text(text: Any, field: str) -> None:
    if not isinstance(text, str):
        raise BadRecord(f"{field} is not text but {type(text).__name__}")
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise BadRecord(f"{field} is not text ({error})") from error


def _ids(found: Any, field: str) -> np.ndarray:
    if found is None:
        return np.empty(0, dtype=np.int64)
    if not isinstance(found, list | np.ndarray):
        raise BadRecord(f"{field} is not a list of token ids but {type(found).__name__}")
    ids = np.asarray(found) if len(found) else np.empty(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BadRecord(f"{field} is not a list of token ids, which are whole numbers")
    return ids


def _messages(found: Any, field: str) -> list[dict[str, str]]:
    """The role and the content of each message."""
    if not isinstance(found, list):
        raise BadRecord(f"{field} is not a list of messages but {type(found).__name__}")
    messages = [_message(message, f"message {number} of {field}") for number, message in enumerate(found, start=1)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRecord(f"{field} has no message of the assistant, from which alone is learned; its roles are {roles}")
    if "system" in roles[1:]:
        raise BadRecord(f"message {roles.index('system', 1) + 1} of {field} is the system's, which must be the first")
    return messages


def _message(found: Any, place: str) -> dict[str, str]:
    if not isinstance(found, dict) or not {"role", "content"} <= found.keys():
        raise BadRecord(f"{place} has no role and content; it is {str(found)[:60]!r}")
    role, content = found["role"], found["content"]
    if role not in ROLES:
        raise BadRecord(f"{place} has the unknown role {role!r}; the roles are {', '.join(ROLES)}")
    _check_text(content, f"the content of {place}")
    if not content.strip():
        raise BadRecord(f"{place}, the {role}'s, is empty; correct the conversation or remove it")
    return {"role": role, "content": content}

"""Conditions that select the records of a source."""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.common.command_line import UserError

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "in": lambda value, allowed: value in allowed,
}


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

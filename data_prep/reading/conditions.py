"""Which records of a source are wanted."""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data_prep.common.command_line import UserError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
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
    """What a column of a record must satisfy: `int_score >= 3`, `language == en`, `lang in ['en', 'de']`."""

    column: str
    comparison: str
    value: Any

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read `COLUMN OPERATOR VALUE`; a value that is no Python literal is a string.

        Raises:
            UserError: for text of another form.
        """
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
        """Whether a record satisfies this; one whose column is null does not.

        Raises:
            UserError: for a column that cannot be compared with the value.
        """
        found = record[self.column]
        if found is None:
            return False
        try:
            return bool(_OPERATORS[self.comparison](found, self.value))
        except TypeError as error:
            raise UserError(f"--where {self.column} {self.comparison} {self.value!r}: {error}") from error

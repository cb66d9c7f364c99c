"""The project's files, each read through a typed schema.

A schema is a dataclass with `__pydantic_config__ = STRICT`; its bounds are annotations (`Positive` is one). Reading any
file returns an instance or raises a `UserError` with file, field, value and bound.
"""

import dataclasses
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from data_prep.common.command_line import UserError, first_line, listed, unknown_name
from data_prep.common.files import read_text

T = TypeVar("T")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_MAX_SHOWN = 60  # characters of a value
_adapter: Any = cache(TypeAdapter)


def read_json(path: Path, kind: type[T]) -> T:
    """Reads a JSON file as `kind`. Raises as `read_text`, and `UserError` for content that does not match."""
    return parse_json(read_text(path), kind, str(path))


def parse_json(text: str, kind: type[T], where: str) -> T:
    """Parses JSON text as `kind` (`UserError` for text that is not JSON or does not match).

    Args:
        where: the origin of the text, for messages.
    """
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {listed([problem for _, problem in _problems(error, kind)])}") from error


def read_json_lines(path: Path, kind: type[T]) -> list[T]:
    """Reads a file of JSON lines. Skips blank lines and an incomplete last line, which a run may be writing.

    Raises as `read_json`, with the line number.
    """
    lines = read_text(path).split("\n")
    return [
        parse_json(line, kind, f"{path}, line {number}")
        for number, line in enumerate(lines[:-1], start=1)
        if line and not line.isspace()
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads the settings of a YAML file: names and plain values. Raises as `read_text`, and a `UserError` for a file
    that is not YAML, is not `name: value`, has a name twice, or has aliases, which can expand beyond the memory."""
    import yaml

    text = read_text(path)
    try:
        settings = yaml.load(text, Loader=_loader())
    except Exception as error:  # its constructors raise many types for invalid values
        raise UserError(f"{path}: not a readable YAML file ({' '.join(str(error).split())[:300]})") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{path}: expected lines of `name: value`, found {type(settings).__name__}")
    return settings


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            if isinstance(node, yaml.MappingNode):
                counts = Counter(str(key.value) for key, _ in node.value)
                if twice := [name for name, count in counts.items() if count > 1]:
                    raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} is there twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def validate(value: Any, kind: type[T], where: str) -> T:
    """Validates a value that was read elsewhere as `kind` (`UserError` if it does not match)."""
    return parse_json(_as_json(value, where), kind, where)


def find_problems(value: Any, kind: type, where: str) -> list[tuple[str, str]]:
    """Field and problem wherever a value does not match `kind`; field "" stands for the whole value."""
    try:
        _adapter(kind).validate_json(_as_json(value, where))
    except ValidationError as error:
        return _problems(error, kind)
    return []


def _as_json(value: Any, where: str) -> str:
    # JSON, because pydantic's strict mode refuses a list for a tuple in Python values.
    try:
        return json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError) as error:  # keys that are not text, numbers of thousands of digits
        raise UserError(f"{where}: {first_line(error)}") from error


def _problems(error: ValidationError, kind: Any) -> list[tuple[str, str]]:
    """All problems, each with its top-level field and a text with field, value and bound."""
    found = []
    for one in error.errors(include_url=False):
        name = ".".join(map(str, one["loc"]))
        reason = one["msg"][0].lower() + one["msg"][1:]
        if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            text = unknown_name(name, _field_names(kind) if len(one["loc"]) == 1 else [])
            text += "" if text.endswith("?") else ", perhaps a newer version's"
        elif one["type"] in ("missing", "missing_argument"):
            text = f"{name} is missing"
        elif one["type"] == "json_invalid":
            text = f"not JSON ({reason.removeprefix('invalid JSON: ')})"
        else:
            value = repr(one["input"])
            shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
            text = f"{name}={shown}: {reason}" if name else f"{shown}: {reason}"
        found.append((str(one["loc"][0]) if one["loc"] else "", text))
    return found


def _field_names(kind: Any) -> list[str]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []

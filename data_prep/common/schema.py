"""Files of ours, read through one typed schema each: dataclasses whose fields have types and bounds.

A schema is a dataclass with `__pydantic_config__ = STRICT`; its bounds are annotations (`Positive` is one). Whatever a
file holds, reading it ends in an instance or in a `UserError` of file, field, value and bound.
"""

import dataclasses
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from data_prep.common.command_line import UserError, first_line, listed, unknown_name
from data_prep.common.files import read_text

T = TypeVar("T")
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_SHOWN = 60  # characters of a value


def read_json(path: Path, kind: type[T]) -> T:
    """The one value of a JSON file, as `kind`. Raises as `read_text`, and `UserError` for what does not fit."""
    return parse_json(read_text(path), kind, str(path))


def parse_json(text: str, kind: type[T], where: str) -> T:
    """JSON text as `kind`; `where` it is from stands in the message.

    Raises:
        UserError: for text that is not JSON, or does not fit `kind`.
    """
    try:
        return _adapter(kind).validate_json(text)
    except ValidationError as error:
        raise UserError(f"{where}: {_problems(error, kind)}") from error


def read_json_lines(path: Path, kind: type[T]) -> list[T]:
    """The values of a file of JSON lines; blank lines are passed over, and so is a last line without its end, which a
    run may be writing. Raises as `read_json`, with the number of the line."""
    lines = read_text(path).split("\n")
    return [
        parse_json(line, kind, f"{path}, line {number}")
        for number, line in enumerate(lines[:-1], start=1)
        if line and not line.isspace()
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file: names and plain values.

    Raises:
        FileNotFoundError: where there is none.
        UserError: as `read_text`; for what is not YAML, not `name: value`, has a name twice, or has aliases, of which a
            few lines can make more than the memory holds.
    """
    import yaml

    text = read_text(path)
    try:
        settings = yaml.load(text, Loader=_loader())
    except Exception as error:  # what its constructors raise for values that are none is of many kinds
        raise UserError(f"{path}: not a readable YAML file ({' '.join(str(error).split())[:300]})") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise UserError(f"{path}: expected lines of `name: value`, found {type(settings).__name__}")
    return settings


@cache
def _loader() -> type:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(
                    problem="aliases (*name) are not read", problem_mark=self.peek_event().start_mark
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            if isinstance(node, yaml.MappingNode):
                counts = Counter(str(key.value) for key, _ in node.value)
                if twice := [name for name, count in counts.items() if count > 1]:
                    raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} is there twice", problem_mark=node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def validate(value: Any, kind: type[T], where: str) -> T:
    """A value that was read otherwise, as `kind` (`UserError` where it does not fit)."""
    # By way of JSON, whose lists and numbers are as strict as those of files.
    try:
        text = json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError) as error:  # names that are no text, numbers of thousands of digits
        raise UserError(f"{where}: {first_line(error)}") from error
    return parse_json(text, kind, where)


@cache
def _adapter(kind: Any) -> Any:
    return TypeAdapter(kind)


def _problems(error: Any, kind: Any) -> str:
    """All that is wrong, each with its field, value and bound."""
    found = []
    for one in error.errors(include_url=False):
        place = ".".join(map(str, one["loc"]))
        reason = one["msg"][0].lower() + one["msg"][1:]
        if one["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            known = (
                [f.name for f in dataclasses.fields(kind)]
                if dataclasses.is_dataclass(kind) and "." not in place
                else []
            )
            found.append(f"{unknown_name(place, known)}, perhaps a newer version's")
        elif one["type"] in ("missing", "missing_argument"):
            found.append(f"{place} is missing")
        elif one["type"] == "json_invalid":
            found.append(f"not JSON ({reason.removeprefix('invalid JSON: ')})")
        else:
            value = repr(one["input"])
            shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
            found.append(f"{place}={shown}: {reason}" if place else f"{shown}: {reason}")
    return listed(found)

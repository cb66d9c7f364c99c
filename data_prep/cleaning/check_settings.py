"""Settings from a file checked against the signature of what takes them."""

import inspect
import types
import typing
from typing import Any

from data_prep.common.command_line import unknown_name


def parameters(kind: type, without: set[str] = frozenset()) -> dict[str, tuple[Any, bool]]:
    """The parameters of a class: what type each has, and whether it must be given."""
    hints = typing.get_type_hints(kind.__init__)
    return {
        name: (hints.get(name, Any), parameter.default is inspect.Parameter.empty)
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in without
    }


def checked(
    known: dict[str, tuple[Any, bool]], settings: dict[str, Any], where: str, problems: list[str]
) -> dict[str, Any]:
    """Those of the settings that are known and of the right type; what is wrong with the others goes to `problems`."""
    prefix, good = f"{where}: " if where else "", {}
    problems += [prefix + unknown_name(str(name), known) for name in settings if name not in known]
    for name, (hint, needed) in known.items():
        if name not in settings:
            problems += [f"{prefix}{name} is missing"] if needed else []
        elif _fits(settings[name], hint):
            good[name] = settings[name]
        else:
            kind = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint
            problems.append(f"{prefix}{name}={settings[name]!r}: should be {kind}")
    return good


def _fits(value: Any, hint: Any) -> bool:
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if kind is tuple or hint is tuple:
        return isinstance(value, list)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint is Any or not isinstance(hint, type) or isinstance(value, hint)

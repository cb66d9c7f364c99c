"""What every command line of the project shares: one-line errors and the nearest name to a wrong one."""

import argparse
import difflib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """Something that the user can mend. Its text is all that is shown: the value, the bound and the remedy."""


EMPTY = "is empty; is a variable of the shell unset?"
_MAY_BE_EMPTY = ("prompt", "sample_prompts", "model_args")  # to continue nothing, to add nothing
_LISTED = 5  # problems in one line
_USER_IN_ADDRESS = re.compile(r"(\w://)[^/?#\s\"]*@")
_SECRET_IN_QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:token|key|secret|pass|pwd|sig|credential|auth|jwt)[^=&\s]*=)[^&\s'\"]+"
)


def redact(text: str) -> str:
    """The text without the secrets of addresses: `user:password@`, and what a query calls token, key or the like."""
    return _SECRET_IN_QUERY.sub(r"\1***", _USER_IN_ADDRESS.sub(r"\1***@", text))


def first_line(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(problems: Sequence[str]) -> str:
    """Problems in one line: the first few, and how many more there are."""
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more


def is_missing(name: str, word: str) -> bool:
    """Whether the value of an option is empty, as `"$UNSET"` is, where that is no value."""
    return not word.strip() and name not in _MAY_BE_EMPTY


def unknown_name(name: str, known: Iterable[str]) -> str:
    """`unknown NAME`, with the nearest of the `known` names where one is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"unknown {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Each option by one of its spellings, what kind of value it takes, and its default where it has one."""

    _KINDS = {int: "N", float: "X", Path: "PATH"}

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and action.option_strings[0] != "-h":
            values = self._format_args(action, self._get_default_metavar_for_optional(action))
            return f"{action.option_strings[0]} {values}".rstrip()
        return super()._format_action_invocation(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.const, bool) and action.nargs == "?":
            return "true|false"
        return self._KINDS.get(action.type, action.dest.upper())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.help is None or default is None or default is False or default in ([], argparse.SUPPRESS):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} [{str(shown).replace('%', '%%')}]"


class ArgumentParser(argparse.ArgumentParser):
    """argparse with defaults in the help, `--both_spellings` of a name, and a suggestion for an unknown one.

    Args:
        doc: the docstring of the command's module: what it does, then how it is called.
    """

    def __init__(self, prog: str, doc: str) -> None:
        summary, _, rest = doc.strip().partition("\n")
        super().__init__(
            prog=prog, description=summary, epilog=rest.strip(), formatter_class=HelpFormatter, allow_abbrev=False
        )

    def add_option(self, name: str, **kwargs: Any) -> None:
        """Add `--some_name`, which `--some-name` spells as well."""
        self.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **kwargs)

    def parse_args(self, args: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error("; ".join(unknown_name(word, self._option_string_actions) for word in rest))
        return parsed

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if is_missing(action.dest, arg_string):
            raise argparse.ArgumentError(action, EMPTY)
        return super()._get_value(action, arg_string)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {redact(message)}\n")


def run(main: Callable[[], None]) -> None:
    """Run a command's `main`: what the user or the machine's files are to blame for (`UserError`, `OSError`) ends it
    with one line and exit code 2, Ctrl-C with exit code 130, a reader of the output that has gone with exit code 1."""
    if unreadable := [word for word in sys.argv[1:] if word != word.encode("utf-8", "replace").decode("utf-8")]:
        print(f"error: {unreadable[0]!r} is not UTF-8 text; rename what it names", file=sys.stderr)
        sys.exit(2)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"error: {redact(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def raise_all(problems: list[str]) -> None:
    """Raise a `UserError` that names every problem, if there is any."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems with the settings:" + "".join(f"\n  - {p}" for p in problems))

"""Command lines: one-line errors, and suggestions for misspelled names."""

import argparse
import dataclasses
import difflib
import errno
import getpass
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar


class UserError(Exception):
    """An error that the user can fix. Only its text is shown: value, bound and remedy."""


T = TypeVar("T")
EMPTY = "is empty; is a variable of the shell unset?"
_MAY_BE_EMPTY = ("prompt", "sample_prompts", "model_args")
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOSPC, errno.EDQUOT)
_MAX_LISTED = 5  # problems in one line
_USER_IN_URL = re.compile(r"(\w://)[^/?#\s\"]*@")
_SECRET_IN_QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:token|key|secret|pass|pwd|sig|credential|auth|jwt)[^=&\s]*=)[^&\s'\"]+"
)


def redact(text: str) -> str:
    """Masks secrets in URLs: `user:password@`, and query values named token, key or similar."""
    return _SECRET_IN_QUERY.sub(r"\1***", _USER_IN_URL.sub(r"\1***@", text))


def cache_problem(error: BaseException | None) -> str | None:
    """Explains why Hugging Face's cache is not writable and what to set; None for any other error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and error.filename:
            from huggingface_hub import constants

            caches = {name: os.environ.get(name) for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE")}
            for name, cache in {**caches, "HF_HOME": constants.HF_HOME}.items():
                # The file is in the cache, or is a folder that the cache would be in.
                paths = [os.path.abspath(cache), os.path.abspath(error.filename)] if cache else []
                if paths and os.path.commonpath(paths) in paths:
                    return f"{error}; set {name} to a folder that can be written to"
        error = error.__cause__ or error.__context__
    return None


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its type's name; for an unwritable cache, the explanation of
    `cache_problem`."""
    if (problem := cache_problem(error)) is not None:
        return problem
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(problems: Sequence[str]) -> str:
    """Joins the first few problems in one line and counts the rest."""
    more = f"; and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    return "; ".join(problems[:_MAX_LISTED]) + more


def raise_all(problems: Sequence[str], what: str = "problems with the settings", prefix: str = "") -> None:
    """Raises a `UserError` with all problems, if there are any.

    Args:
        what: the noun after the number of problems.
        prefix: text before the problems, such as `FILE: `.
    """
    if len(problems) == 1:
        raise UserError(prefix + problems[0])
    if problems:
        raise UserError(f"{prefix}{len(problems)} {what}:" + "".join(f"\n  - {problem}" for problem in problems))


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A dataclass field that is also a command line option; `kwargs` as in `add_argument`."""
    return dataclasses.field(default=default, metadata={"help": help, **kwargs})


def is_missing(name: str, word: str) -> bool:
    """Whether an option that needs a value has an empty one, such as `"$UNSET"`."""
    return not word.strip() and name not in _MAY_BE_EMPTY


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Returns `unknown NAME`, and the most similar `known` name if there is one."""
    similar = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"unknown {name!r}" + (f"; did you mean {similar[0]!r}?" if similar else "")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows one spelling of each option, its value type and its default."""

    _KINDS: dict[Any, str] = {int: "N", float: "X", Path: "PATH"}

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
    """argparse that shows defaults, accepts `--some_name` and `--some-name`, and suggests names.

    Args:
        doc: the docstring of the command's module: a summary, then examples.
    """

    def __init__(self, prog: str, doc: str | None) -> None:
        summary, _, rest = (doc or "").strip().partition("\n")
        super().__init__(
            prog=prog, description=summary, epilog=rest.strip(), formatter_class=HelpFormatter, allow_abbrev=False
        )

    def add_option(self, name: str, **kwargs: Any) -> None:
        """Adds `--some_name`, also spelled `--some-name`."""
        self.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]), **kwargs)

    def add_fields(self, kind: Any, required: bool = True) -> None:
        """Adds an option for each field of a dataclass that `option` describes; tuples are lists.

        Args:
            required: fields without a default have to be given.
        """
        for field in dataclasses.fields(kind):
            if field.metadata:
                default = list(field.default) if isinstance(field.default, tuple) else field.default
                if default is dataclasses.MISSING:
                    self.add_option(field.name, required=required, **field.metadata)
                else:
                    self.add_option(field.name, default=default, **field.metadata)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
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


def limit_spinning() -> None:
    """Limits how long OpenMP threads spin while waiting for each other, unless the environment already says.

    By default they spin for milliseconds: beside another busy process, or a second rank, on the core of the thread that
    they wait for (docs/benchmarks.md). libgomp reads the environment when it is loaded: call this before torch is.
    """
    if not any(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def _check_environment() -> None:
    if os.path.expanduser("~") == "~":  # no HOME, no passwd entry: libraries would make a folder of that name
        os.environ["HOME"] = "/"  # as Docker does
    try:
        getpass.getuser()
    except (KeyError, OSError):  # torch before 2.13 needs a name for the cache of torch.compile; later ones take this
        os.environ["USER"] = f"uid_{os.getuid()}"
    # Huggingface_hub cannot be loaded with other values, and does not say whose they are.
    timeouts = {name: os.environ.get(name, "1") for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")}
    wrong = [f"{name}={text!r}" for name, text in timeouts.items() if not text.isdecimal() or int(text) < 1]
    raise_all([f"{setting} is not a whole number of seconds from 1; correct or unset it" for setting in wrong])


def run(main: Callable[[], T]) -> T:
    """Runs a command's `main` and returns its result. Exit codes: 2 and one line for `UserError` and `OSError`, 130 for
    Ctrl-C, 1 if the reader of the output has closed it."""
    if unreadable := [word for word in sys.argv[1:] if word != word.encode("utf-8", "replace").decode("utf-8")]:
        print(f"error: {unreadable[0]!r} is not UTF-8 text; rename what it names", file=sys.stderr)
        sys.exit(2)
    try:
        _check_environment()
        limit_spinning()
        result = main()
        sys.stdout.flush()
        return result
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        sys.exit(1)
    except (UserError, OSError) as error:
        text = str(error) if isinstance(error, UserError) else first_line(error)
        print(f"error: {redact(text)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

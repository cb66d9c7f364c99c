"""Standard output that cannot end a run."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any


class Screen:
    """A stream that falls silent once the stream behind it fails: a closed pipe, a full disk, a lost terminal.

    Attributes:
        failure: message about that, to be recorded once; None before and after.
    """

    def __init__(self, name: str, stream: Any) -> None:
        self.name, self.stream = name, stream
        self.failure: str | None = None
        if stream is None or stream.closed:
            self._silence("it was closed at the start")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        # For terminals with ASCII only, the rest is escaped.
        self._attempt(self.stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, act: Callable[..., Any], *arguments: Any) -> None:
        try:
            act(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._silence(str(error))

    def _silence(self, reason: str) -> None:
        """Sends the rest of the output, that of libraries in C too, to the null device."""
        before, self.stream = self.stream, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it has no descriptor
            os.dup2(self.stream.fileno(), before.fileno())
        self.failure = f"{self.name} is gone ({reason}); the run continues without it"


def install() -> None:
    """Replaces stdout and stderr of this process by a `Screen`, once."""
    for number in (0, 1, 2):  # else the next file that is opened would get these numbers, and the output of libraries
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), Screen):
            setattr(sys, name, Screen(name, stream))


def messages() -> list[str]:
    """Returns the messages about failed streams, each once."""
    found: list[str] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Screen) and stream.failure is not None:
            found.append(stream.failure)
            stream.failure = None
    return found

"""Standard output that cannot end a run."""

import io
import os
import sys
from collections.abc import Callable
from typing import TextIO


class Screen(io.TextIOBase):
    """A stream that ignores further output after the stream behind it fails: a closed pipe, full disk, lost terminal.

    Args:
        name: of the stream, for the message.
        stream: None if the process was started without one.
    """

    def __init__(self, name: str, stream: TextIO | None) -> None:
        self.name, self.stream = name, stream
        self.message: str | None = None
        if stream is None or stream.closed:
            self.stream = None
            self._note("it was closed at the start")

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def fileno(self) -> int:
        if self.stream is None:
            raise io.UnsupportedOperation("no stream")
        return self.stream.fileno()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)  # such as `buffer`, which libraries may use

    def write(self, text: str) -> int:
        # For terminals with ASCII only, the rest is escaped.
        shown = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._attempt(lambda stream: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda stream: stream.flush())

    def _attempt(self, act: Callable[[TextIO], object]) -> None:
        if self.stream is None:
            return
        try:
            act(self.stream)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            stream, self.stream = self.stream, None
            _discard(stream)
            self._note(str(error))

    def _note(self, reason: str) -> None:
        self.message = f"{self.name} is gone ({reason}); the run continues without it"

    def take_message(self) -> str | None:
        """The message about a failed stream, once; else None."""
        message, self.message = self.message, None
        return message


def _discard(stream: TextIO) -> None:
    """Redirects the rest of a stream's buffer, and everything that libraries still write to it, to the null device."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no descriptor: nothing can be written to it
        return


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
    """The messages about failed streams, each once."""
    screens = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Screen)]
    return [message for screen in screens if (message := screen.take_message()) is not None]

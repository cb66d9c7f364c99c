"""Requests to end a run early: signals and the time limit."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

# Two signals this close are one Ctrl-C: the terminal sends it to every process, and launchers pass it on.
_SAME_SIGNAL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
# From schedulers and launchers, Slurm's warnings, a lost terminal, the limit of processor time.
_KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)


class StopRequest:
    """A request to this process to stop: true once it is made, with its reason. Ranks agree before they act on it."""

    def __init__(self, max_minutes: float | None) -> None:
        self.reason: str | None = None
        self.interrupted_at: float | None = None
        self.max_minutes = max_minutes
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.request(f"max_minutes={self.max_minutes:g}")
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Makes the request, unless there is one already."""
        self.reason = self.reason or reason

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Makes the request; a second Ctrl-C ends the process at once."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is None:
                self.interrupted_at = now
                if os.environ.get("RANK", "0") == "0":
                    # Not print(): the signal may interrupt one.
                    with contextlib.suppress(OSError):  # the screen is gone
                        os.write(2, b"\nstopping after this step; Ctrl-C again to stop at once\n")
            elif now - self.interrupted_at > _SAME_SIGNAL_SECONDS:
                raise KeyboardInterrupt
        self.request(signal.Signals(number).name)


@contextlib.contextmanager
def stop_requests(max_minutes: float | None) -> Iterator[StopRequest]:
    """Handles Ctrl-C, the end of the launcher, the end of `max_minutes` and the signals of `_KINDS` as requests to
    stop. Under `nohup` SIGHUP stays ignored."""
    request = StopRequest(max_minutes)
    _follow_launcher()
    before = {kind: signal.getsignal(kind) for kind in _KINDS}
    taken = [kind for kind, handler in before.items() if kind != signal.SIGHUP or handler != signal.SIG_IGN]
    for kind in taken:
        signal.signal(kind, request.on_signal)
    try:
        yield request
    finally:
        for kind in taken:
            signal.signal(kind, before[kind])


def _follow_launcher() -> None:
    """Makes the system send SIGTERM when the launcher dies. The launcher of a single process passes no signal on: this
    process would stay and hold the devices."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

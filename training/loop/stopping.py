"""Requests to end a run early: signals, and the clock."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

# Two Ctrl-C so close together are one: launchers pass on what the terminal has sent to every process already.
_SAME_SIGNAL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of sys/prctl.h
# A scheduler's or launcher's end, Slurm's warnings, a lost terminal, the end of the processor time.
_KINDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)


class StopRequest:
    """Whether this process has been asked to end, and by what. The processes of a run agree on it before they act."""

    def __init__(self, max_minutes: float | None) -> None:
        self.reason: str | None = None
        self.interrupted_at: float | None = None
        self.max_minutes = max_minutes
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = f"max_minutes={self.max_minutes:g}"
        return self.reason is not None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Take note; a second Ctrl-C ends the process at once."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_at is None:
                self.interrupted_at = now
                if os.environ.get("RANK", "0") == "0":
                    # Not print(): the signal may have come in the middle of one.
                    with contextlib.suppress(OSError):  # the screen is gone
                        os.write(2, b"\nstopping after this step; Ctrl-C again to stop at once\n")
            elif now - self.interrupted_at > _SAME_SIGNAL_SECONDS:
                raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name


@contextlib.contextmanager
def stop_requests(max_minutes: float | None) -> Iterator[StopRequest]:
    """Take Ctrl-C, the end of the launcher, the end of `max_minutes` and the signals of `_KINDS` as requests to stop;
    under `nohup`, which has processes ignore SIGHUP, not that one."""
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
    """Have the system send SIGTERM when the launcher dies: that of a single process passes no signal on, and would
    leave an orphan behind that holds the devices."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

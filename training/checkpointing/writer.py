"""Background writer of checkpoints: one at a time, while training continues."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from data_prep.common.command_line import UserError, first_line
from training.checkpointing.checkpoint import Snapshot, write_checkpoint
from training.checkpointing.store import complete_checkpoints, mark_committed, prune_checkpoints

_PAUSES = (1, 5)  # seconds before another attempt
_NICENESS = 15  # about a thirtieth of a core that training wants too


class Saver:
    """Writes a run's checkpoints in a thread.

    Failed saves are retried, then skipped with a warning: the earlier ones are still there, and training continues to
    the next. Only the first one of a run and the last must succeed.

    Args:
        stop: asks the run to stop, for the reason given: its first checkpoint cannot be written.
    """

    def __init__(self, checkpoints: Path, stop: Callable[[str], None]) -> None:
        self.checkpoints, self.stop = checkpoints, stop
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saver", initializer=_lower_priority)
        self.tasks: list[Future[None]] = []
        self.results: SimpleQueue[str] = SimpleQueue()
        self.failure: str | None = None  # of the last checkpoint, or of the first, which ends the run
        self.has_started = True  # False once the first checkpoint could not be written
        self.ending = threading.Event()

    def save(self, snapshot: Snapshot) -> None:
        """Starts writing a checkpoint once the previous one is done."""
        self.wait()
        self.tasks.append(self.thread.submit(self._save, snapshot))

    def prune(self, *limits: Any) -> None:
        """Calls `prune_checkpoints` after the current write; a failure is only reported."""

        def attempt() -> None:
            try:
                prune_checkpoints(self.checkpoints, *limits)
            except (OSError, UserError, ValueError) as error:
                self.results.put(f"an older checkpoint could not be removed: {first_line(error)}")

        self.tasks.append(self.thread.submit(attempt))

    def messages(self) -> list[str]:
        """Messages since the last call."""
        return [self.results.get() for _ in range(self.results.qsize())]

    def wait(self) -> None:
        """Waits until nothing is being written."""
        for task in self.tasks:
            task.result()
        self.tasks.clear()

    def finish(self) -> None:
        """Waits, then checks that the first and the last checkpoint were written (`UserError` if not)."""
        self.wait()
        if self.failure is not None:
            before = complete_checkpoints(self.checkpoints)
            last = f"the last one is {before[-1]}" if before else "there is none before it"
            raise UserError(f"{self.failure}; {last}. Correct this, and --resume_from_checkpoint continues from there")

    def close(self) -> None:
        """Ends the thread after the current write."""
        self.ending.set()
        self.thread.shutdown(cancel_futures=True)

    def _save(self, snapshot: Snapshot) -> None:
        for pause in (*_PAUSES, None):
            try:
                folder = write_checkpoint(snapshot, self.checkpoints)
                mark_committed(self.checkpoints.parent, snapshot.state.step)
            except Exception as error:  # of any kind: training must not end by it
                reason = f"{type(error).__name__}: {first_line(error)}"
                self.failure = f"step {snapshot.state.step} could not be saved: {reason}"
                next_try = "giving up until the next checkpoint" if pause is None else f"again in {pause} s"
                self.results.put(f"{self.failure}; {next_try}")
                if pause is not None:
                    self.ending.wait(pause)
                elif not complete_checkpoints(self.checkpoints):
                    self.has_started = False
                    self.stop("the first checkpoint cannot be written")
            else:
                self.failure = None if self.has_started else self.failure
                self.results.put(f"step {snapshot.state.step:>6}  saved {folder}")
                return


def _lower_priority() -> None:
    """Yields the cores to training: nobody waits for this thread until the next checkpoint."""
    if sys.platform == "linux":  # elsewhere the priority of the whole process would change
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

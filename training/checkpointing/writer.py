"""Checkpoints written in the background, one at a time, while training goes on."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from data_prep.common.command_line import UserError, first_line
from training.checkpointing.snapshot import Snapshot, write_checkpoint
from training.checkpointing.storage import complete_checkpoints, mark_committed

_PAUSES = (1, 5)  # seconds before another attempt
_NICENESS = 15  # a thirtieth of the time of a core that training wants too


class Saver:
    """Writes checkpoints of a run in a thread; what it has to say waits until it is asked for.

    A checkpoint that cannot be written is tried again, and given up loudly: the ones before it are still there, and
    training goes on to the next. Only the last one of a run must succeed.
    """

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints = checkpoints
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="saver", initializer=_stand_back)
        self.tasks: list[Future[None]] = []
        self.said: SimpleQueue[str] = SimpleQueue()
        self.failure: str | None = None  # of the last checkpoint
        self.ending = threading.Event()

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, once the one before it is done."""
        self.wait()
        self.tasks.append(self.thread.submit(self._save, snapshot))

    def afterwards(self, what: str, task: Callable[[], None]) -> None:
        """Do something once the checkpoint that is being written is done.

        Args:
            what: to say of it where it fails, which does no harm.
        """

        def attempt() -> None:
            try:
                task()
            except (OSError, UserError, ValueError) as error:
                self.said.put(f"{what}: {first_line(error)}")

        self.tasks.append(self.thread.submit(attempt))

    def messages(self) -> list[str]:
        """What has been done since this was last asked."""
        return [self.said.get() for _ in range(self.said.qsize())]

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        for task in self.tasks:
            task.result()
        self.tasks.clear()

    def finish(self) -> None:
        """Wait, and see that the last checkpoint has been written.

        Raises:
            UserError: if it has not.
        """
        self.wait()
        if self.failure is not None:
            before = complete_checkpoints(self.checkpoints)
            last = f"the last one is {before[-1]}" if before else "there is none before it"
            raise UserError(f"{self.failure}; {last}. Mend this, and --resume goes on from there")

    def close(self) -> None:
        """End the thread, after the checkpoint that it is writing."""
        self.ending.set()
        self.thread.shutdown(cancel_futures=True)

    def _save(self, snapshot: Snapshot) -> None:
        for pause in (*_PAUSES, None):
            try:
                folder = write_checkpoint(snapshot, self.checkpoints)
                mark_committed(self.checkpoints.parent, snapshot.state.step)
            except Exception as error:  # whatever it is, training must not end by it
                self.failure = (
                    f"step {snapshot.state.step} could not be saved: {type(error).__name__}: {first_line(error)}"
                )
                again = "giving up until the next checkpoint" if pause is None else f"again in {pause} s"
                self.said.put(f"{self.failure}; {again}")
                if pause is not None:
                    self.ending.wait(pause)
            else:
                self.failure = None
                self.said.put(f"step {snapshot.state.step:>6}  saved {folder}")
                return


def _stand_back() -> None:
    """Let this thread have the cores that training leaves; nobody waits for it until the next checkpoint."""
    if sys.platform == "linux":  # elsewhere it is the whole process whose priority would be lowered
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

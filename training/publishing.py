"""Uploads to the Hub during training: each by a process of its own, which cannot harm the run.

RUN/hub has an empty file named after each checkpoint that waits for its upload. Such a checkpoint is not pruned.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.common.command_line import first_line
from data_prep.common.files import write_text
from training.checkpointing.store import is_checkpoint, step_of

QUEUE = "hub"
_NICENESS = 15  # about a thirtieth of a core that training wants too
_POLL_SECONDS = 0.1


def queue_entry(checkpoint: Path) -> Path:
    """The file that queues a checkpoint for upload."""
    return checkpoint.parents[1] / QUEUE / checkpoint.name


def pending(run_folder: Path) -> list[Path]:
    """The complete checkpoints that wait for their upload, oldest first."""
    queue = run_folder / QUEUE
    names = sorted(os.listdir(queue)) if queue.is_dir() else []
    checkpoints = [run_folder / "checkpoints" / name for name in names]
    return [one for one in checkpoints if is_checkpoint(one) and queue_entry(one).is_file()]


class Uploads:
    """Runs `training.publish` for queued checkpoints.

    A checkpoint whose upload fails stays in the queue for the next attempt, of this run or by hand.

    Args:
        flush: writes the records of the run, from which model cards are made, to their files.
        every: upload every queued checkpoint, not only the newest.
    """

    def __init__(self, run_folder: Path, flush: Callable[[], None], every: bool) -> None:
        self.run_folder, self.flush, self.every = run_folder, flush, every
        self.process: subprocess.Popen[bytes] | None = None
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        self.uploading: list[Path] = []
        self.newest = next(reversed(pending(run_folder)), None)  # None once its upload has been attempted
        self.messages = self._start("--check")

    def enqueue(self, checkpoint: Path) -> None:
        """Queues the checkpoint of a step; `poll` uploads it once it is written and the metrics of its step are."""
        self.newest = checkpoint
        try:
            self._waiting()
            queue_entry(checkpoint).parent.mkdir(exist_ok=True)
            write_text(queue_entry(checkpoint), "")
        except OSError as error:
            self.messages.append(f"{checkpoint.name} could not be queued for upload: {first_line(error)}")

    def poll(self, recorded: int) -> list[str]:
        """Polls the upload, returns new messages, starts the next.

        Args:
            recorded: the last step whose metrics are all recorded.
        """
        messages = self.messages + self._results("tried again with the next checkpoint")
        self.messages = []
        newest = self.newest
        if self.process is None and newest is not None and step_of(newest) <= recorded and is_checkpoint(newest):
            self.newest = None
            self.flush()
            messages += self._upload()
        return messages

    def finish(self, stopping: Callable[[], bool]) -> Iterator[str]:
        """Uploads the queue, until it is empty or the run is to stop; yields messages."""
        yield from self.messages
        remedy = f"this tries again: python -m training.publish {shlex.quote(str(self.run_folder))}"
        if not self.uploading:
            self._terminate()  # the check of access
        yield from self._wait(stopping, "tried again at the end")
        failed = ""
        if (left := pending(self.run_folder)) and not stopping():
            yield f"uploading {left[-1].name}; Ctrl-C leaves that for later"
            for failed in (*self._upload(), *self._wait(stopping, remedy)):
                yield failed
        self.close()
        if (left := pending(self.run_folder)) and remedy not in failed:
            yield f"{left[-1].name} has not been published; {remedy}"

    def close(self) -> None:
        """Ends the running upload; its checkpoint stays in the queue."""
        self._terminate()
        self.output.close()

    def _terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process, self.uploading = None, []

    def _waiting(self) -> list[Path]:
        """The queued checkpoints to upload; where only the newest is, older ones leave the queue."""
        waiting = pending(self.run_folder)
        if self.every:
            return waiting
        for outdated in waiting[:-1]:
            if outdated not in self.uploading:
                queue_entry(outdated).unlink()
        return waiting[-1:]

    def _upload(self) -> list[str]:
        try:
            self.uploading = self._waiting()
        except OSError as error:
            return [f"not published: {first_line(error)}"]
        return self._start("--step", *(str(step_of(one)) for one in self.uploading)) if self.uploading else []

    def _start(self, *options: str) -> list[str]:
        """Starts the command; returns the reason if that is not possible."""
        words = [sys.executable, "-m", "training.publish", str(self.run_folder), *options]
        try:
            self.output.seek(0)
            self.output.truncate()
            self.process = subprocess.Popen(words, stdout=self.output, stderr=self.output, stdin=subprocess.DEVNULL)
            os.setpriority(os.PRIO_PROCESS, self.process.pid, _NICENESS)
        except OSError as error:
            return [f"not published: {first_line(error)}"]
        return []

    def _wait(self, stopping: Callable[[], bool], on_failure: str) -> list[str]:
        while self.process is not None and self.process.poll() is None and not stopping():
            time.sleep(_POLL_SECONDS)
        return self._results(on_failure)

    def _results(self, on_failure: str) -> list[str]:
        """The messages of the process, if it has ended: each upload, and the reason of a failure."""
        if self.process is None or self.process.poll() is None:
            return []
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        failed, self.process, self.uploading = self.process.returncode != 0, None, []
        published = [line for line in lines if line.startswith("step ")]
        reason = lines[-1].removeprefix("error: ") if lines else "no reason was given"
        return published + ([f"not published: {reason}; {on_failure}"] if failed else [])

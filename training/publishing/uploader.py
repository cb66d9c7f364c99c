"""Uploads to the Hub during training: each by a process of its own, which cannot harm the run."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from data_prep.common.command_line import UserError, first_line
from training.checkpointing.storage import is_checkpoint, step_of
from training.checkpointing.writer import Saver
from training.publishing.queue import enqueue, pending

_NICENESS = 15  # about a thirtieth of a core that training wants too
_POLL_SECONDS = 0.1


class Uploads:
    """Runs `training.publish` for queued checkpoints, whenever there is a new one.

    A checkpoint whose upload fails stays in the queue for the next attempt, of this run or by hand.

    Args:
        saver: of the run's checkpoints.
        flush: writes the records of the run, from which model cards are made, to their files.
    """

    def __init__(self, run_folder: Path, saver: Saver, flush: Callable[[], None]) -> None:
        self.run_folder, self.saver, self.flush = run_folder, saver, flush
        self.process: subprocess.Popen[bytes] | None = None
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        self.requested: Path | None = None
        self.newest: Path | None = next(reversed(pending(run_folder)), None)
        self.tried: Path | None = None
        self.messages, self.checking = self._start("--check"), True

    def enqueue(self, checkpoint: Path) -> None:
        """Queues a checkpoint, after it is written and all metrics of its step are recorded."""
        self.requested = checkpoint

    def poll(self, recorded: int) -> list[str]:
        """Polls the upload, returns new messages, starts the next.

        Args:
            recorded: the last step whose metrics are all recorded.
        """
        if self.requested is not None and step_of(self.requested) <= recorded:
            self.flush()
            self.saver.afterwards("a checkpoint could not be queued for upload", partial(self._enqueue, self.requested))
            self.requested = None
        messages = self.messages + self._results("tried again with the next checkpoint")
        self.messages = []
        newest = self.newest
        if self.process is None and newest not in (None, self.tried):
            self.tried, self.checking = newest, False
            messages += self._start()
        return messages

    def finish(self, stopping: Callable[[], bool]) -> Iterator[str]:
        """Uploads the queue, until it is empty or the run is to stop; yields messages."""
        remedy = f"this tries again: python -m training.publish {shlex.quote(str(self.run_folder))}"
        if self.requested is not None:
            try:
                self._enqueue(self.requested)
            except (OSError, UserError, ValueError) as error:
                yield f"not published: {first_line(error)}; {remedy}"
        if self.checking:
            self._terminate()
        yield from self._wait(stopping, "tried again at the end")
        failed = ""
        if (left := pending(self.run_folder)) and not stopping():
            yield f"uploading {left[-1].name}; Ctrl-C leaves that for later"
            for failed in (*self._start(), *self._wait(stopping, remedy)):
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
            self.process = None

    def _enqueue(self, checkpoint: Path) -> None:
        if is_checkpoint(checkpoint):  # if it could be written
            self.newest, self.tried = enqueue(checkpoint, self.run_folder), None

    def _start(self, *options: str) -> list[str]:
        """Starts an upload; returns the reason if that is not possible."""
        words = _command(self.run_folder, *options)
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
        failed, self.process = self.process.returncode != 0, None
        published = [line for line in lines if line.startswith("step ")]
        return published + ([f"not published: {_reason(lines)}; {on_failure}"] if failed else [])


def check_access(run_folder: Path) -> None:
    """Checks that the Hub would take the uploads of a run.

    Raises:
        UserError: if not.
    """
    done = subprocess.run(_command(run_folder, "--check"), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(_reason(done.stderr.splitlines()))


def _command(run_folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "training.publish", str(run_folder), *options]


def _reason(lines: list[str]) -> str:
    return lines[-1].removeprefix("error: ") if lines else "no reason was given"

"""Uploads to the Hub while training goes on: each by a process of its own, which cannot harm the run."""

import os
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
from training.publishing.queue import put, waiting

_NICENESS = 15  # a thirtieth of the time of a core that training wants too
_POLL_SECONDS = 0.1


class Uploads:
    """Has `training.publish` upload what waits to be, and says what has come of it.

    It is tried whenever there is something new; what could not be uploaded waits for the next attempt, of this run or
    by hand.

    Args:
        saver: of the run's checkpoints.
        flush: brings the records of the run, which model cards are made from, to their files.
    """

    def __init__(self, run_folder: Path, saver: Saver, flush: Callable[[], None]) -> None:
        self.run_folder, self.saver, self.flush = run_folder, saver, flush
        self.process: subprocess.Popen[bytes] | None = None
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  closed by close
        self.expected: Path | None = None
        self.newest: Path | None = next(reversed(waiting(run_folder)), None)
        self.tried: Path | None = None
        self.said, self.checking = self._start("--check"), True

    def expect(self, checkpoint: Path) -> None:
        """Have a checkpoint uploaded, once it is written and all records of its step are there."""
        self.expected = checkpoint

    def look(self, recorded: int) -> list[str]:
        """What has come of the uploads since this was last asked; what waits is set about.

        Args:
            recorded: the last step that all records are there of.
        """
        if self.expected is not None and step_of(self.expected) <= recorded:
            self.flush()
            self.saver.afterwards("a checkpoint could not be set aside for the Hub", partial(self._put, self.expected))
            self.expected = None
        said = self.said + self._ended("tried again with the next checkpoint")
        self.said = []
        newest = self.newest
        if self.process is None and newest not in (None, self.tried):
            self.tried, self.checking = newest, False
            said += self._start()
        return said

    def finish(self, stopping: Callable[[], bool]) -> Iterator[str]:
        """Upload what waits, unless or until the run is to stop; yields what has come of it."""
        again = f"this tries again: python -m training.publish {self.run_folder}"
        if self.expected is not None:
            try:
                self._put(self.expected)
            except (OSError, UserError, ValueError) as error:
                yield f"not published: {first_line(error)}; {again}"
        if self.checking:
            self._terminate()
        yield from self._wait(stopping, "tried again at the end")
        failed = ""
        if (left := waiting(self.run_folder)) and not stopping():
            yield f"uploading {left[-1].name}; Ctrl-C leaves that for later"
            for failed in (*self._start(), *self._wait(stopping, again)):
                yield failed
        self.close()
        if (left := waiting(self.run_folder)) and again not in failed:
            yield f"{left[-1].name} has not been published; {again}"

    def close(self) -> None:
        """End the upload that is under way; what has not been uploaded waits."""
        self._terminate()
        self.output.close()

    def _terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def _put(self, checkpoint: Path) -> None:
        if is_checkpoint(checkpoint):  # if it could be written
            self.newest, self.tried = put(checkpoint, self.run_folder), None

    def _start(self, *options: str) -> list[str]:
        """Begin an upload, or say why that is not possible."""
        words = _command(self.run_folder, *options)
        try:
            self.output.seek(0)
            self.output.truncate()
            self.process = subprocess.Popen(words, stdout=self.output, stderr=self.output, stdin=subprocess.DEVNULL)
            os.setpriority(os.PRIO_PROCESS, self.process.pid, _NICENESS)
        except OSError as error:
            return [f"not published: {first_line(error)}"]
        return []

    def _wait(self, stopping: Callable[[], bool], otherwise: str) -> list[str]:
        while self.process is not None and self.process.poll() is None and not stopping():
            time.sleep(_POLL_SECONDS)
        return self._ended(otherwise)

    def _ended(self, otherwise: str) -> list[str]:
        """What the process has said, if it has ended: what it has published, and why it could not."""
        if self.process is None or self.process.poll() is None:
            return []
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").splitlines()
        failed, self.process = self.process.returncode != 0, None
        published = [line for line in lines if line.startswith("step ")]
        return published + ([f"not published: {_reason(lines)}; {otherwise}"] if failed else [])


def check_access(run_folder: Path) -> None:
    """See that the Hub would take what a run is to upload.

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

"""What a run writes down: `log.txt` in build-nanogpt's lines, `metrics.jsonl`, `samples.jsonl`; and the progress."""

import errno
import io
import json
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker

from data_prep.common.command_line import UserError, redact
from data_prep.common.files import read_text, write_text
from data_prep.common.schema import parse_json
from eval.hellaswag import Result
from eval.reporting.run_records import MetricsLine, Sample
from training.records import screen


def log_pictures(tracker: GeneralTracker, pictures: list[Path], step: int) -> None:
    """Show pictures in a tracker, each kind of which takes them in its own way."""
    if tracker.name == "trackio":
        import trackio

        tracker.log({path.stem: trackio.Image(path) for path in pictures}, step=step)
        return
    if not hasattr(tracker, "log_images"):
        return
    import numpy as np
    from PIL import Image

    options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    for path in pictures:
        with Image.open(path) as image:
            tracker.log_images({path.stem: np.array(image.convert("RGB"))[None]}, step=step, **options)


class RunLog:
    """The files and the screen of a run; does nothing on processes other than the main one."""

    def __init__(self, folder: Path, from_step: int, max_steps: int, log_every: int, enabled: bool) -> None:
        """Open the logs in `folder`, cut back to the steps before `from_step`."""
        self.folder, self.log_every, self.enabled = folder, log_every, enabled
        self.pending: dict[str, Any] = {}  # evaluations, until the step that follows them is recorded with them
        if not enabled:
            return
        self._open(from_step)
        from tqdm import tqdm

        # disable=None: no bar where there is no terminal; plain lines stand in for it there.
        self.bar = tqdm(total=max_steps, initial=from_step, unit="step", disable=None, dynamic_ncols=True)
        self.started, self.first_step, self.max_steps = time.perf_counter(), from_step, max_steps

    def _open(self, from_step: int) -> None:
        self.text = _Lines(self.folder / "log.txt", _step_of_text, from_step)
        self.metrics = _Lines(self.folder / "metrics.jsonl", partial(_step_of, MetricsLine), from_step)
        self.samples = _Lines(self.folder / "samples.jsonl", partial(_step_of, Sample), from_step)

    def cut(self, from_step: int) -> None:
        """Go back to the steps before `from_step`."""
        if not self.enabled:
            return
        for file in (self.text, self.metrics, self.samples):
            file.close()
        self._open(from_step)
        self.pending = {}
        self.bar.n = from_step
        self.bar.refresh()

    def print(self, text: str) -> None:
        """Show a line without disturbing the bar."""
        if self.enabled:
            self.bar.write(redact(text))
            sys.stdout.flush()

    def train(self, step: int, values: dict[str, Any]) -> None:
        """Record one step: `values` go to metrics.jsonl, the loss to log.txt, the gist to the screen."""
        if not self.enabled:
            return
        self.text.write(f"{step} train {values['loss']:.6f}\n")
        self._write_metrics({"step": step, **self.pending, **values})
        gist = f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(gist, refresh=False)
        self.bar.update()
        if self.bar.disable and (step + 1) % self.log_every == 0:
            pace = (time.perf_counter() - self.started) / (step + 1 - self.first_step)
            left = pace * (self.max_steps - step - 1)
            self.print(f"step {step + 1:>6}/{self.max_steps}  {gist}, {left:,.0f} s left")

    def skipped(self, step: int, first: int, stop: int) -> None:
        """Record a step whose batch, the sequences from `first` to before `stop`, was passed over."""
        if not self.enabled:
            return
        self._write_metrics({"step": step, **self.pending, "skipped": [first, stop]})
        self.bar.update()

    def validation(self, step: int, loss: float, bits_per_byte: float, consumed: dict[str, dict[str, float]]) -> None:
        """Record a validation, in nats per token and bits per byte of text, and how far the data has been read."""
        if not self.enabled:
            return
        self.text.write(f"{step} val {loss:.4f}\n")
        self._evaluated(step, {"val_loss": loss, "val_bits_per_byte": bits_per_byte, "data": consumed})
        self.print(f"step {step:>6}  validation loss {loss:.4f}, {bits_per_byte:.3f} bits per byte")
        for folder, read in consumed.items() if len(consumed) > 1 else ():
            self.print(f"{'':13}{folder}: {read['share']:.1%}, {read['tokens']:,} tokens, {read['epochs']:.2f} epochs")

    def hellaswag(self, step: int, result: Result) -> None:
        """Record a result on HellaSwag; build-nanogpt's line has the acc_norm of the completion rule."""
        if not self.enabled:
            return
        if result.rule == "completion":
            self.text.write(f"{step} hella {result.acc_norm:.4f}\n")
        self._evaluated(step, result.metrics())
        self.print(f"step {step:>6}  HellaSwag ({result.rule}) {result}")

    def harness(self, step: int, scores: dict[str, float]) -> None:
        """Record scores of the lm-evaluation-harness, by task and metric."""
        if not self.enabled:
            return
        self._evaluated(step, scores)
        for name, score in scores.items():
            self.print(f"step {step:>6}  {name} {score:.4f}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record and show one continued prompt."""
        if not self.enabled:
            return
        self.samples.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
        lines = "".join(f"    | {line}\n" for line in (prompt + text).splitlines())
        self.print(f"step {step:>6}  sample\n{lines}".rstrip())

    def flush(self) -> None:
        """Bring all that was recorded to the files."""
        for file in (self.text, self.metrics, self.samples) if self.enabled else ():
            file.flush()

    def close(self) -> None:
        """End the bar and the files; an evaluation that no step followed is written as it is."""
        if not self.enabled:
            return
        self.enabled = False
        self.bar.close()
        if self.pending:
            self._write_metrics(self.pending)
        for file in (self.text, self.metrics, self.samples):
            file.close()

    def _evaluated(self, step: int, values: dict[str, Any]) -> None:
        self.pending = {**self.pending, "step": step, **values}

    def _write_metrics(self, values: dict[str, Any]) -> None:
        if gone := screen.messages():
            values = {**values, "message": "; ".join(gone)}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.metrics.write(json.dumps(finite) + "\n")  # JSON has no word for the others
        self.pending = {}


class _Lines:
    """A log that is appended to. What does not fit on a full disk waits until it does: training goes on."""

    _FLUSH_BYTES = 1 << 13

    def __init__(self, path: Path, step_of: Callable[[str], int], from_step: int) -> None:
        """Open it without the lines of the steps from `from_step` on, and what was cut off in writing."""
        _cut(path, step_of, from_step)
        self.file: io.FileIO = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close
        self.waiting = b""

    def write(self, text: str) -> None:
        self.waiting += text.encode()
        if len(self.waiting) > self._FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Bring what waits to the file, as far as there is room for it."""
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def close(self) -> None:
        self.flush()
        self.file.close()


def _step_of(kind: type[MetricsLine] | type[Sample], line: str) -> int:
    return parse_json(line, kind, "").step


def _step_of_text(line: str) -> int:
    words = line.split()
    if not words or not re.fullmatch(r"[0-9]{1,18}", words[0]):
        raise UserError("it does not begin with a step")
    return int(words[0])


def _cut(path: Path, step_of: Callable[[str], int], from_step: int) -> None:
    kept, unreadable = [], 0
    for line in read_text(path, errors="replace").split("\n")[:-1] if path.exists() else ():
        try:
            if "\ufffd" in line:
                raise UserError("not UTF-8 text")
            kept += [line] if line.strip() and step_of(line) < from_step else []
        except UserError:
            unreadable += 1
    if unreadable:
        print(f"{path}: {unreadable} unreadable lines are left out")
    write_text(path, "".join(f"{line}\n" for line in kept))

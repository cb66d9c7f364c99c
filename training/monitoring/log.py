"""Files of a run (`config.yaml`, `environment.json`, `log.txt` in build-nanogpt's format, `metrics.jsonl`,
`samples.jsonl`) and its screen, whose failure cannot end it."""

import contextlib
import errno
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tqdm import tqdm

from data_prep.common.command_line import UserError, redact
from data_prep.common.files import read_text, write_text
from data_prep.common.hub import is_on_hub
from data_prep.common.schema import parse_json
from data_prep.prepare import preparing_command
from eval.reporting.records import MetricsLine, Sample
from training.engine.data import Data
from training.engine.distributed import describe_device
from training.settings.schema import START, TrainingConfig

_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "tiktoken", "numpy", "safetensors", "gpt-accelerate")
# The lines of log.txt: "STEP train LOSS" and so on, as build-nanogpt writes them.
_LOG_TXT = {"loss": "train {:.6f}", "val_loss": "val {:.4f}", "hellaswag/completion/acc_norm": "hella {:.4f}"}


class RunLog(GeneralTracker):
    """Log files and screen of a run, as one of Accelerate's trackers; does nothing on ranks other than the first."""

    name = "run_log"
    requires_logging_directory = False

    def __init__(self, folder: Path, from_step: int, max_steps: int, logging_steps: int, enabled: bool) -> None:
        """Opens the files in `folder`, truncated to the steps before `from_step`."""
        super().__init__()
        self.folder, self.logging_steps, self.enabled = folder, logging_steps, enabled
        if not enabled:
            return
        self._open(from_step)
        # disable=None: no bar where there is no terminal, but plain lines.
        self.bar = tqdm(total=max_steps, initial=from_step, unit="step", disable=None, dynamic_ncols=True)

    @property
    def tracker(self) -> "RunLog":
        return self

    def _open(self, from_step: int) -> None:
        self.text = _Lines(self.folder / "log.txt", _step_of_text, from_step)
        self.metrics = _Lines(
            self.folder / "metrics.jsonl", lambda line: parse_json(line, MetricsLine, "").step, from_step
        )
        self.samples = _Lines(self.folder / "samples.jsonl", lambda line: parse_json(line, Sample, "").step, from_step)
        self.files = (self.text, self.metrics, self.samples)
        self.pending: dict[str, Any] = {}  # written with the next step
        self.started, self.first_step = time.perf_counter(), from_step

    def truncate(self, from_step: int) -> None:
        """Removes all records from `from_step` on."""
        if not self.enabled:
            return
        for file in self.files:
            file.close()
        self._open(from_step)
        self.bar.n = from_step
        self.bar.refresh()

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.enabled:
            self.bar.write(redact(text))
            sys.stdout.flush()

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Records the metrics of a training step, or of an evaluation before it; `sample` records texts."""
        for name in _LOG_TXT.keys() & values.keys():
            self.text.write(f"{step} {_LOG_TXT[name].format(values[name])}\n")
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        self.pending |= {"step": step, **numbers}
        if "loss" in values and step is not None:
            self._write_pending()
            self._show_progress(step + 1, values)

    def note(self, **details: Any) -> None:
        """Adds details that are not metrics to the next line of metrics.jsonl."""
        if self.enabled:
            self.pending |= details

    def skipped(self, step: int, first: int, stop: int) -> None:
        """Records a step whose batch, the sequences from `first` to before `stop`, is skipped."""
        if self.enabled:
            self.pending |= {"step": step, "skipped": [first, stop]}
            self._write_pending()
            self.bar.update()

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Records and shows a prompt with its continuation."""
        if not self.enabled:
            return
        self.samples.write(json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n")
        lines = "".join(f"    | {line}\n" for line in (prompt + text).splitlines())
        self.print(f"step {step:>6}  sample\n{lines}".rstrip())

    def flush(self) -> None:
        """Flushes everything recorded so far to the files."""
        for file in self.files if self.enabled else ():
            file.flush()

    def finish(self) -> None:
        """Closes the bar and the files; an evaluation not followed by a step gets its own line."""
        if not self.enabled:
            return
        self.enabled = False
        self.bar.close()
        if self.pending:
            self._write_pending()
        for file in self.files:
            file.close()

    def _show_progress(self, done: int, values: dict[str, Any]) -> None:
        summary = progress(values)
        self.bar.set_postfix_str(summary, refresh=False)
        self.bar.update()
        if self.bar.disable and done % self.logging_steps == 0:
            left = (time.perf_counter() - self.started) / (done - self.first_step) * (self.bar.total - done)
            self.print(f"step {done:>6}/{self.bar.total}  {summary}, {left:,.0f} s left")

    def _write_pending(self) -> None:
        if messages := screen_messages():
            self.pending["message"] = "; ".join(messages)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.pending.items()}
        self.metrics.write(json.dumps(finite) + "\n")  # JSON has no NaN and no infinity
        self.pending = {}


def progress(values: dict[str, Any]) -> str:
    """Formats the metrics of a step in one line."""
    parts = [
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"norm {values['grad_norm']:.2f}",
        f"{1000 * values['batch_tokens'] / values['tokens_per_second']:,.0f} ms",
        f"{values['tokens_per_second']:,.0f} tokens/s",
    ]
    of_gpu = {"gpu_utilization": "GPU {:.0f}%", "gpu_temperature": "{:.0f} °C", "gpu_power": "{:.0f} W"}
    readings = [form.format(values[name]) for name, form in of_gpu.items() if name in values]
    if readings:
        readings.insert(1, f"{values['memory_bytes'] / 2**30:.1f} GiB")
    return ", ".join(parts + readings)


class _Lines:
    """An append-only log. On a full disk, lines wait in memory and training continues."""

    _FLUSH_BYTES = 1 << 13

    def __init__(self, path: Path, step_of: Callable[[str], int], from_step: int) -> None:
        """Opens it, without the lines from `from_step` on and without a line that is cut off."""
        kept, unreadable = [], 0
        for line in read_text(path, errors="replace").split("\n")[:-1] if path.exists() else ():
            try:
                if "\ufffd" in line:
                    raise UserError("not UTF-8 text")
                kept += [line] if line.strip() and step_of(line) < from_step else []
            except UserError:
                unreadable += 1
        if unreadable:
            print(f"{path}: {unreadable} unreadable lines are skipped")
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.file: io.FileIO = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close
        self.waiting = b""

    def write(self, text: str) -> None:
        self.waiting += text.encode()
        if len(self.waiting) > self._FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes waiting lines as far as the disk has room."""
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def close(self) -> None:
        self.flush()
        self.file.close()


def _step_of_text(line: str) -> int:
    words = line.split()
    if not words or not re.fullmatch(r"[0-9]{1,18}", words[0]):
        raise UserError("does not begin with a step")
    return int(words[0])


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
        """Redirects further output, including that of C libraries, to the null device."""
        before, self.stream = self.stream, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it has no descriptor
            os.dup2(self.stream.fileno(), before.fileno())
        self.failure = f"{self.name} is gone ({reason}); the run continues without it"


def install_screen() -> None:
    """Wraps stdout and stderr of this process in a `Screen`, once."""
    for number in (0, 1, 2):  # else the next file that is opened would get these numbers, and the output of libraries
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if not isinstance(stream := getattr(sys, name), Screen):
            setattr(sys, name, Screen(name, stream))


def screen_messages() -> list[str]:
    """Returns the messages about failed streams, each once."""
    found: list[str] = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Screen) and stream.failure is not None:
            found.append(stream.failure)
            stream.failure = None
    return found


def write_environment(
    config: TrainingConfig, accelerator: Accelerator, data: Data, parameters: int, flops_per_token: int
) -> None:
    """Writes the settings, and the versions, git revision, hardware and data, into the run's folder."""
    base_model = config.model.model_name_or_path
    settings = {name: value for name, value in config.to_dict().items() if name not in START}
    environment = {
        "command": list(map(redact, sys.argv)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed_version(name) for name in _PACKAGES},
        "git_revision": git_revision(Path(__file__)),
        "device": describe_device(accelerator.device),
        "num_processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "base_model": None if base_model is None or Path(base_model).exists() else base_model,  # on the Hub
        "parameters": parameters,
        "flops_per_token": flops_per_token,
        "data": [
            {
                "folder": name,
                "source": redact(manifest.source.source),
                "name": manifest.source.name,
                "revision": manifest.source.commit,
                "prepared_by": [] if is_on_hub(name) else list(map(redact, preparing_command(name, manifest))),
                "cleaning": [asdict(step) for step in manifest.cleaning],
                "tokenizer": manifest.tokenizer.name,
                "training_tokens": manifest.tokens("train"),
                "share": share,
            }
            for name, manifest, share in zip(data.names, data.manifests, data.shares, strict=True)
        ],
    }
    write_text(config.run_folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_text(config.run_folder / "environment.json", json.dumps(environment, indent=2) + "\n")


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision(file: Path) -> str | None:
    """Commit of the repository that tracks `file`, with "+" if there are local changes; None if no repository does."""

    def git(*arguments: str | Path) -> str:
        return subprocess.run(["git", *arguments], cwd=file.parent, capture_output=True, text=True).stdout

    try:
        if not git("ls-files", file.name):  # installed into the environment of another repository
            return None
        return git("describe", "--always", "--abbrev=40", "--dirty=+").strip() or None
    except OSError:
        return None

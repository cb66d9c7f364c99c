"""The parts of the GPU trial that start runs: each says what it finds, or fails with what comes up."""

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from eval.reporting.run_records import Record, read_run

_ROOT = Path(__file__).parents[1]
_EOS = 256  # behind the bytes


@dataclass(frozen=True)
class Trial:
    """What a part works with.

    Attributes:
        out: folder of the results; parts leave what they make in `out/work`.
        say: writes a result down: what it is of, and its value.
    """

    out: Path
    say: Callable[[str, str], None]

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu else "cpu")

    @property
    def flags(self) -> list[str]:
        """The flags of the runs, which are to work and not to be fast: a model, and a batch."""
        if self.on_gpu:
            words = "--n_layer 4 --n_embd 512 --n_head 8 --n_positions 1024 --batch_tokens 65536 --micro_batch 32"
        else:
            words = "--n_layer 2 --n_embd 32 --n_head 2 --n_positions 128 --batch_tokens 512 --micro_batch 4"
        return words.split()


def texts() -> list[str]:
    """The modules of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.py"))]


def data(trial: Trial) -> Path:
    """A data folder of bytes, and HellaSwag's format beside it: what follows some lines, among other lines."""
    from data_prep.register import adopt
    from data_prep.tokenization.tokenizer import ByteLevelTokenizer

    folder = trial.out / "work" / "data"
    if (folder / "manifest.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    documents = texts()
    for split, part in (("val", documents[:12]), ("train", documents[12:])):
        ids = [np.concatenate([[_EOS], np.frombuffer(text.encode(), np.uint8)]) for text in part]
        np.save(folder / f"bytes_{split}_000000.npy", np.concatenate(ids).astype(np.uint16))
    ByteLevelTokenizer("bytes", {bytes([byte]): byte for byte in range(256)}, _EOS).save(folder / "tokenizer")
    lines = [line.strip() for text in documents for line in text.splitlines()]
    lines = [line for line in lines if 20 < len(line) < 80 and "[" not in line]  # which HellaSwag takes for a label
    with open(folder.with_name("swag.jsonl"), "w", encoding="utf-8") as file:
        for n in range(0, 2000, 5):
            item = {"activity_label": "Python", "ctx": lines[n], "ctx_a": lines[n], "ctx_b": "", "label": 0}
            file.write(json.dumps(item | {"endings": lines[n + 1 : n + 5]}) + "\n")
    adopt(folder)
    return folder


def train(trial: Trial, name: str, *flags: object, launch_file: str | None = None) -> tuple[Record | None, str]:
    """Run training/train.py under Accelerate: its record, if it leaves one, and what it printed."""
    launch_file = launch_file or ("single_gpu" if trial.on_gpu else "cpu")
    place = trial.out / "work"
    words = ["--data", data(trial), *trial.flags, "--runs_dir", place / "runs", "--run_name", name]
    words += ["--val_tokens", 8192, "--warmup_steps", 2, "--schedule", "constant"]
    words += ["--learning_rate", "6e-4", "--sample_tokens", 16, *flags]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file"]
    command = [*launcher, _ROOT / "accelerate_configs" / f"{launch_file}.yaml", _ROOT / "training" / "train.py", *words]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))  # where nothing is installed
    log = place / f"{name}.txt"
    with open(log, "ab") as file:
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        code = subprocess.call(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, cwd=place, env=environment
        )
    printed = log.read_text(encoding="utf-8", errors="replace")
    print(printed, flush=True)
    if code:
        raise RuntimeError(f"{name}: {_reason(printed)}")
    folder = place / "runs" / name
    return read_run(folder) if folder.is_dir() else None, printed


def _reason(printed: str) -> str:
    """The last error that a process has printed, the launcher's own aside."""
    error = re.compile(r"(\[rank\d+\]: ?)?(error: |[\w.]*(Error|Exception)\b)")
    of_launchers = ("CalledProcessError", "ChildFailedError")
    lines = [line for line in printed.splitlines() if error.match(line) and not any(e in line for e in of_launchers)]
    return lines[-1] if lines else "failed"


def losses(run: Record) -> list[float]:
    return run.curves["loss"].values


def difference(one: Record, other: Record) -> float:
    """The largest between the losses of two runs."""
    return max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))


def speed_of(run: Record) -> str:
    """Tokens a second, the median of the second half of a run."""
    values = run.curves["tokens_per_second"].values
    return f"{statistics.median(values[len(values) // 2 :]):,.0f} tokens/s"


def run(trial: Trial) -> None:
    """A run with all that a run does, and the same one stopped and resumed."""
    swag = ["--hellaswag_every", 10, "--hellaswag_data", data(trial).with_name("swag.jsonl"), "--hellaswag_limit", 64]
    often = ["--save_every", 10, "--val_every", 10, "--sample_every", 10]
    whole, _ = train(trial, "whole", "--max_steps", 20, *often, *swag)
    trial.say("20 steps, single GPU" if trial.on_gpu else "20 steps", speed_of(whole))
    trial.say("loss, first and last", f"{losses(whole)[0]:.4f}, {losses(whole)[-1]:.4f}")
    train(trial, "resumed", "--max_steps", 10, *often)
    resumed, _ = train(trial, "resumed", "--max_steps", 20, *often, "--resume", "--override", "max_steps")
    worst = difference(whole, resumed)
    trial.say("stopped at step 10 and resumed", f"losses differ by {worst:.1e} at most")
    if not worst < 0.1:  # the same bits are `--deterministic`'s
        raise RuntimeError(f"a resumed run has losses that differ by {worst}")


def fsdp2(trial: Trial) -> None:
    """FSDP2 in one process, and its checkpoint resumed plainly."""
    if not trial.on_gpu:
        trial.say("FSDP2", "needs a GPU: Accelerate does not shard on a CPU")
        return
    flags = ["--save_every", 10, "--val_every", 10, "--sample_every", 10]
    train(trial, "eager", "--max_steps", 3, "--compile", "off", *flags, launch_file="fsdp2")
    trial.say("FSDP2 in one process, not compiled", "works")
    sharded, _ = train(trial, "sharded", "--max_steps", 10, *flags, launch_file="fsdp2")
    both, _ = train(trial, "sharded", "--max_steps", 20, *flags, "--resume", "--override", "max_steps")
    plain, _ = train(trial, "plain", "--max_steps", 20, *flags)
    worst = difference(both, plain)
    trial.say("FSDP2 in one process", speed_of(sharded))
    trial.say("resumed plainly, beside a plain run", f"losses differ by {worst:.1e} at most")
    if not worst < 0.3:
        raise RuntimeError(f"FSDP2 and a plain run have losses that differ by {worst}")


def options(trial: Trial) -> None:
    """Muon, fp16, and whether `--deterministic` gives the same bits twice."""
    none = ["--save_every", 100, "--val_every", 100, "--sample_every", 0, "--compile", "off"]
    done, _ = train(trial, "muon", "--max_steps", 10, "--optimizer", "muon", *none)
    trial.say("Muon", f"{speed_of(done)}, loss {losses(done)[-1]:.4f}")
    if trial.on_gpu:
        done, _ = train(trial, "fp16", "--max_steps", 10, "--mixed_precision", "fp16", *none)
        trial.say("fp16", f"{speed_of(done)}, loss {losses(done)[-1]:.4f}")
    hashes = set()
    for name in ("first", "second"):
        done, _ = train(trial, name, "--max_steps", 10, "--deterministic", "true", *none)
        weights = trial.out / "work" / "runs" / name / "checkpoints" / "step_00000010" / "model.safetensors"
        hashes.add(hashlib.sha256(weights.read_bytes()).hexdigest())
    trial.say("--deterministic", f"{speed_of(done)}; two runs: {'the same bits' if len(hashes) == 1 else 'DIFFERENT'}")
    if len(hashes) > 1:
        raise RuntimeError("--deterministic gives other weights each time")


def micro_batch(trial: Trial) -> None:
    """What `--micro_batch auto` finds, and what preflight says."""
    _, printed = train(trial, "auto", "--max_steps", 2, "--micro_batch", "auto", "--sample_every", 0)
    trial.say("--micro_batch auto", next(line for line in printed.splitlines() if line.startswith("batch ")).strip())
    _, printed = train(trial, "checked", "--max_steps", 1000, "--preflight")
    for line in islice((line for line in printed.splitlines() if line.startswith(("time ", "memory "))), 2):
        trial.say(f"preflight, {line.split()[0]}", line.partition(" ")[2].strip())

"""The parts of `python -m benchmarks.gpu_trial` that start runs. Each reports results, or raises an error."""

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

from eval.reporting.records import Record, read_run

_ROOT = Path(__file__).parents[1]
_EOS = 256  # the id after those of all bytes


@dataclass(frozen=True)
class Trial:
    """The folder of results, whose `work` is for the files of parts, and a function that reports a named result."""

    out: Path
    report: Callable[[str, str], None]

    @property
    def on_gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_gpu else "cpu")

    @property
    def flags(self) -> list[str]:
        """Returns the flags for model and batch of the runs, which test that training works, not its speed."""
        if self.on_gpu:
            words = "--n_layer 4 --n_embd 512 --n_head 8 --n_positions 1024 --batch_tokens 65536"
            return [*words.split(), "--per_device_train_batch_size", "32"]
        words = "--n_layer 2 --n_embd 32 --n_head 2 --n_positions 128 --batch_tokens 512"
        return [*words.split(), "--per_device_train_batch_size", "4"]


def texts() -> list[str]:
    """Returns the source of the modules of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.glob("*.py"))]


def data(trial: Trial) -> Path:
    """Creates a data folder of bytes, and beside it a file in HellaSwag's format: lines, and which line follows."""
    from data_prep.register import register
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
    lines = [line for line in lines if 20 < len(line) < 80 and "[" not in line]  # HellaSwag's cleaning removes brackets
    with open(folder.with_name("swag.jsonl"), "w", encoding="utf-8") as file:
        for n in range(0, 2000, 5):
            item = {"activity_label": "Python", "ctx": lines[n], "ctx_a": lines[n], "ctx_b": "", "label": 0}
            file.write(json.dumps(item | {"endings": lines[n + 1 : n + 5]}) + "\n")
    register(folder)
    return folder


def train(trial: Trial, name: str, *flags: object, config: str | None = None) -> tuple[Record | None, str]:
    """Runs training/train.py with an Accelerate config, and returns its record, if there is one, and its output."""
    config = config or ("single_gpu" if trial.on_gpu else "cpu")
    work = trial.out / "work"
    folder = work / "runs" / name
    words = ["--data", data(trial), *trial.flags, "--output_dir", folder]
    words += ["--val_tokens", 8192, "--warmup_steps", 2, "--lr_scheduler_type", "constant"]
    words += ["--optim", "adamw", "--learning_rate", "6e-4", "--sample_tokens", 16, *flags]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file"]
    command = [*launcher, _ROOT / "accelerate_configs" / f"{config}.yaml", _ROOT / "training" / "train.py", *words]
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))  # the project may not be installed
    log = work / f"{name}.txt"
    with open(log, "ab") as file:
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        code = subprocess.call(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, cwd=work, env=environment
        )
    printed = log.read_text(encoding="utf-8", errors="replace")
    print(printed, flush=True)
    if code:
        raise RuntimeError(f"{name}: {_last_error(printed)}")
    return read_run(folder) if folder.is_dir() else None, printed


def _last_error(printed: str) -> str:
    """Returns the last error in the output of a process that is not the launcher's."""
    error = re.compile(r"(\[rank\d+\]: ?)?(error: |[\w.]*(Error|Exception)\b)")
    of_launchers = ("CalledProcessError", "ChildFailedError")
    lines = [line for line in printed.splitlines() if error.match(line) and not any(e in line for e in of_launchers)]
    return lines[-1] if lines else "failed"


def losses(run: Record) -> list[float]:
    return run.curves["loss"].values


def difference(one: Record, other: Record) -> float:
    """Returns the largest difference between the losses of two runs."""
    return max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))


def speed_of(run: Record) -> str:
    """Returns the median speed of the second half of a run."""
    values = run.curves["tokens_per_second"].values
    return f"{statistics.median(values[len(values) // 2 :]):,.0f} tokens/s"


def run(trial: Trial) -> None:
    """Tests a run with all kinds of evaluations, and the same run stopped and resumed."""
    swag = ["--hellaswag_every", 10, "--hellaswag_data", data(trial).with_name("swag.jsonl"), "--hellaswag_limit", 64]
    often = ["--save_steps", 10, "--eval_steps", 10, "--sample_every", 10]
    complete, _ = train(trial, "complete", "--max_steps", 20, *often, *swag)
    trial.report("20 steps, single GPU" if trial.on_gpu else "20 steps", speed_of(complete))
    trial.report("loss, first and last", f"{losses(complete)[0]:.4f}, {losses(complete)[-1]:.4f}")
    train(trial, "resumed", "--max_steps", 10, *often)
    resumed, _ = train(
        trial, "resumed", "--max_steps", 20, *often, "--resume_from_checkpoint", "--override", "max_steps"
    )
    largest = difference(complete, resumed)
    trial.report("stopped at step 10 and resumed", f"losses differ by {largest:.1e} at most")
    if not largest < 0.1:  # bitwise equality needs `--full_determinism`
        raise RuntimeError(f"a resumed run has losses that differ by {largest}")


def fsdp2(trial: Trial) -> None:
    """Tests FSDP2 in one process, and that its checkpoint can be resumed without FSDP2."""
    if not trial.on_gpu:
        trial.report("FSDP2", "needs a GPU: Accelerate does not shard on a CPU")
        return
    flags = ["--save_steps", 10, "--eval_steps", 10, "--sample_every", 10]
    train(trial, "eager", "--max_steps", 3, "--torch_compile", "false", *flags, config="fsdp2")
    trial.report("FSDP2 in one process, not compiled", "works")
    sharded, _ = train(trial, "sharded", "--max_steps", 10, *flags, config="fsdp2")
    both, _ = train(trial, "sharded", "--max_steps", 20, *flags, "--resume_from_checkpoint", "--override", "max_steps")
    plain, _ = train(trial, "plain", "--max_steps", 20, *flags)
    largest = difference(both, plain)
    trial.report("FSDP2 in one process", speed_of(sharded))
    trial.report("resumed without FSDP2, beside a run without it", f"losses differ by {largest:.1e} at most")
    if not largest < 0.3:
        raise RuntimeError(f"FSDP2 and a plain run have losses that differ by {largest}")


def options(trial: Trial) -> None:
    """Tests Muon, fp16, and that `--full_determinism` gives the same weights twice."""
    none = ["--save_steps", 100, "--eval_steps", 100, "--sample_every", 0, "--torch_compile", "false"]
    done, _ = train(trial, "muon", "--max_steps", 10, "--optim", "muon", *none)
    trial.report("Muon", f"{speed_of(done)}, loss {losses(done)[-1]:.4f}")
    if trial.on_gpu:
        done, _ = train(trial, "fp16", "--max_steps", 10, "--mixed_precision", "fp16", *none)
        trial.report("fp16", f"{speed_of(done)}, loss {losses(done)[-1]:.4f}")
    hashes = set()
    for name in ("first", "second"):
        done, _ = train(trial, name, "--max_steps", 10, "--full_determinism", "true", *none)
        weights = trial.out / "work" / "runs" / name / "checkpoints" / "step_00000010" / "model.safetensors"
        hashes.add(hashlib.sha256(weights.read_bytes()).hexdigest())
    trial.report(
        "--full_determinism", f"{speed_of(done)}; two runs: {'the same bits' if len(hashes) == 1 else 'DIFFERENT'}"
    )
    if len(hashes) > 1:
        raise RuntimeError("--full_determinism gives other weights each time")


def micro_batch(trial: Trial) -> None:
    """Reports the micro-batch that `auto` finds, and preflight's estimates."""
    _, printed = train(trial, "auto", "--max_steps", 2, "--per_device_train_batch_size", "auto", "--sample_every", 0)
    trial.report(
        "--per_device_train_batch_size auto",
        next(line for line in printed.splitlines() if line.startswith("batch ")).strip(),
    )
    _, printed = train(trial, "checked", "--max_steps", 1000, "--preflight")
    for line in islice((line for line in printed.splitlines() if line.startswith(("time ", "memory "))), 2):
        trial.report(f"preflight, {line.split()[0]}", line.partition(" ")[2].strip())

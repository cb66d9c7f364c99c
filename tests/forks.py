"""Real training processes that start at once: forked from one that has imported all that they need."""

import os
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from conftest import ROOT, Finished, launch

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["training.train", "eval.report", "transformers.models.auto.tokenization_auto"])

Plant = Callable[[], None]  # what goes wrong, put in place in the process before it trains


@dataclass
class Training:
    """A process that trains, or has trained.

    Attributes:
        output: what it has written to both of its streams.
    """

    process: object
    cwd: Path
    output: Path

    def ended(self) -> tuple[int, str]:
        """Its exit code, negative for a signal, and its output, once it has ended."""
        self.process.join(timeout=1200)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode, self.output.read_text()

    def ended_with(self, expected: int) -> str:
        """Its output; it must have ended with this exit code, and an error of the user without a traceback."""
        code, text = self.ended()
        assert code == expected and (code != 2 or "Traceback" not in text), f"exit code {code}\n{text}"
        return text

    def finished(self, name: str) -> Finished:
        """The run it made, which must have ended well."""
        return Finished(self.cwd / "runs" / name, self.ended_with(0))


def begin(argv: list[object], cwd: Path, plant: Plant | None = None, env: dict[str, str] | None = None) -> Training:
    """`python training/train.py ARGV` from `cwd`, as the one process of a run.

    Args:
        plant: must be picklable: a function of a module, or a `functools.partial` of one.
    """
    on_cpu = {"ACCELERATE_USE_CPU": "true"}  # as accelerate_configs/cpu.yaml says
    return begin_command("training.train", argv, cwd, plant, on_cpu | (env or {}))


def begin_command(
    module: str, argv: list[object], cwd: Path, plant: Plant | None = None, env: dict[str, str] | None = None
) -> Training:
    """`python -m MODULE ARGV` from `cwd`."""
    output = cwd / f"output_{len(list(cwd.glob('output_*')))}"
    process = _CONTEXT.Process(target=_run, args=(module, list(map(str, argv)), cwd, output, plant, env or {}))
    process.start()
    return Training(process, cwd, output)


def launch_planted(
    plant: Plant, *flags: object, cwd: Path, env: dict[str, str] | None = None, exit_code: int | None = 0
) -> subprocess.CompletedProcess:
    """Train in two processes of Accelerate, each with the plant."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | (env or {}) | {"PLANT": pickle.dumps(plant).hex(), "PYTHONPATH": path}
    options = {"launch_file": "cpu_ddp", "script": "tests/planted_train.py", "exit_code": exit_code}
    return launch(*flags, cwd=cwd, env=environment, **options)


def _run(module: str, argv: list[str], cwd: Path, output: Path, plant: Plant | None, env: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    file = str(ROOT.joinpath(*module.split(".")).with_suffix(".py"))
    sys.argv = [file, *argv]
    if plant is not None:
        plant()
    if module == "training.train":  # the very module that a plant has changed
        from data_prep.common.command_line import run
        from training.train import main, read_config

        run(lambda: main(read_config()))
    else:
        runpy.run_path(file, run_name="__main__")

"""Test and measure training on a machine with one GPU: what works, how fast, and where the time goes.

    python -m benchmarks.gpu_trial [--minutes 8] [--out gpu_trial]

Each part runs in its own process with its own time limit, and writes results as it goes. It needs no network and no
files: its texts are the sources of Python's standard library. On a CPU all sizes are tiny.
"""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data_prep.common.command_line import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before torch is loaded

import psutil

from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import write_text

RESULTS = "results.jsonl"
_MOST_MINUTES = 1440
_ROOT = Path(__file__).parents[1]  # benchmarks are not installed: `python -m` finds them from here
# Share of the time of each part; unused time goes to the later parts.
SHARES = {
    "versions": 0.05,
    "run": 0.14,
    "speed": 0.29,
    "profile": 0.1,
    "fsdp2": 0.14,
    "loss": 0.07,
    "options": 0.1,
    "evaluation": 0.05,
    "micro_batch": 0.06,
}


@dataclass(frozen=True)
class Result:
    """One result of a part: name and value."""

    part: str
    name: str
    value: str


def run_part(name: str, out: Path, seconds: float) -> str:
    """Runs a part in a process of its own for at most `seconds`, and returns whether it works, or why it failed."""
    started = time.monotonic()
    with open(out / f"{name}.log", "wb") as log:
        command = [sys.executable, "-m", "benchmarks.gpu_trial", "--out", str(out), "--part", name]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=_ROOT)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s, which was its share of the time"
        finally:
            end_process_tree(process)
    if code == 0:
        return f"works ({time.monotonic() - started:.0f} s)"
    lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"failed: {lines[-1].strip()[:200] if lines else f'exit code {code}'}"


def end_process_tree(process: subprocess.Popen) -> None:
    """Kills a process, if it is running, and all its descendants, in any session."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for one in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(descendants, timeout=15)
    process.wait()


def read_results(out: Path) -> list[Result]:
    """Reads the results written so far."""
    file = out / RESULTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [Result(**json.loads(line)) for line in lines]


def write_result(out: Path, result: Result) -> None:
    """Appends a result immediately, as the process may be killed at any time, and prints it."""
    with open(out / RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(vars(result)) + "\n")
    print_result(result)


def print_result(result: Result) -> None:
    print(f"{result.part:12} {result.name:42} {result.value}", flush=True)


def table(results: list[Result]) -> str:
    """Returns the results in Markdown, the verdicts last."""
    rows = [f"| {one.part} | {one.name} | {one.value} |" for one in results if one.name != "verdict"]
    verdicts = [f"- **{one.part}** {one.value}" for one in results if one.name == "verdict"]
    return "\n".join(["| part | | |", "|---|---|---|", *rows, "", *verdicts, ""])


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.gpu_trial", __doc__)
    parser.add_option("minutes", type=float, default=8.0, help="time for all parts together")
    parser.add_option("out", type=Path, default=Path("gpu_trial"), help="folder to create for results and logs")
    parser.add_option("parts", nargs="+", default=list(SHARES), choices=list(SHARES), help="parts to run")
    parser.add_option("part", choices=list(SHARES), help="run only this one, in this process")
    args = parser.parse_args()
    out = args.out.absolute()
    if args.part is not None:
        from benchmarks import trial_parts, trial_runs

        module = trial_runs if hasattr(trial_runs, args.part) else trial_parts
        trial = trial_runs.Trial(out, lambda name, value: write_result(out, Result(args.part, name, value)))
        getattr(module, args.part)(trial)
        return
    if not 0 < args.minutes <= _MOST_MINUTES:
        raise UserError(f"minutes={args.minutes} must be greater than 0, and at most {_MOST_MINUTES}")
    if out.exists():
        raise UserError(f"out={args.out} exists; choose another name")
    out.mkdir(parents=True)
    deadline = time.monotonic() + 60 * args.minutes
    for number, name in enumerate(args.parts):
        left = deadline - time.monotonic()
        share = SHARES[name] / sum(SHARES[other] for other in args.parts[number:])
        verdict = run_part(name, out, max(1.0, left * share)) if left > 1 else "not started: no time left"
        for one in read_results(out):
            if one.part == name:
                print_result(one)
        write_result(out, Result(name, "verdict", verdict))
    results = read_results(out)
    write_text(out / "results.md", table(results))
    print(f"\n{table(results)}\n{args.out / 'results.md'}")
    if any(one.name == "verdict" and not one.value.startswith("works") for one in results):
        sys.exit(1)


if __name__ == "__main__":
    run(main)

"""Speed of training steps beside other busy processes, by how long OpenMP's threads spin while they wait.

    python -m benchmarks.busy_machine [--busy 0 1 2]

The benchmark starts the other processes itself: each keeps one core busy. The two settings take turns.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.interleaved import Setup, run_interleaved, spread
from benchmarks.training_step import SIZES, step_workload
from data_prep.common.command_line import ArgumentParser, run
from data_prep.common.openmp import spin_limit

_LIBGOMP = "300000"  # spins, libgomp's own limit where there are no more threads than cores


@contextmanager
def company(count: int) -> Iterator[None]:
    """Keeps `count` other processes busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.busy_machine", __doc__)
    parser.add_option("busy", type=int, nargs="+", default=[0, 1, 2], help="numbers of other processes")
    parser.add_option("steps", type=int, default=3, help="steps in a round")
    parser.add_option("rounds", type=int, default=5, help="rounds of measurements")
    parser.add_option("precision", default="no", choices=["bf16", "no"], help="of the arithmetic")
    args = parser.parse_args()
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    variables = {"gpt-accelerate": {}, "libgomp's default": {"GOMP_SPINCOUNT": _LIBGOMP}}
    size = SIZES["quickstart"]
    setup: Setup = partial(step_workload, "gpt-accelerate", size, args.precision, args.steps)
    print(f"quickstart's model, {os.cpu_count()} cores, torch {torch.__version__}, tokens/s (spread)\n")
    print("| other processes | " + " | ".join(variables) + " | ratio (spread) |\n|---|---|---|---|")
    medians = {}
    for busy in args.busy:
        with company(busy):
            variables["gpt-accelerate"] = spin_limit()
            found = run_interleaved(dict.fromkeys(variables, setup), args.rounds, variables)
        seconds = {name: taken for name, (taken, _) in found.items()}
        speeds = {name: [args.steps * size.tokens / one for one in taken] for name, taken in seconds.items()}
        ratios = [new / old for new, old in zip(*speeds.values(), strict=True)]
        cells = [spread(one, ",.0f") for one in speeds.values()]
        print(f"| {busy} | {' | '.join(cells)} | {spread(ratios, '.2f')} |", flush=True)
        medians[busy] = statistics.median(speeds["gpt-accelerate"])
    shares = [f"{speed / medians[args.busy[0]]:.2f} beside {busy}" for busy, speed in medians.items()]
    print(f"\ngpt-accelerate's speed as a share of the first: {', '.join(shares)}")


if __name__ == "__main__":
    run(main)

"""Speed of training steps beside other busy processes, by how often OpenMP's threads spin before they sleep.

    python -m benchmarks.busy_machine [--busy 0 1] [--spins 1000 300000] [--vocab_size 4096]

The benchmark starts the other processes itself: each keeps one core busy. The settings take turns.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from benchmarks.interleaved import Setup, run_interleaved, spread
from benchmarks.training_step import SIZES, step_workload
from data_prep.common.command_line import ArgumentParser, run


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
    parser.add_option("precision", default="bf16", choices=["bf16", "no"], help="of the arithmetic")
    parser.add_option(
        "spins", type=int, nargs="+", default=[1_000, 3_000, 10_000, 300_000], help="the last: libgomp's own"
    )
    parser.add_option("vocab_size", type=int, default=4096, help="of the quickstart's model")
    args = parser.parse_args()
    os.environ.pop("OMP_WAIT_POLICY", None)
    variables = {str(spins): {"GOMP_SPINCOUNT": str(spins)} for spins in args.spins}
    size = replace(SIZES["quickstart"], vocab_size=args.vocab_size)
    setup: Setup = partial(step_workload, "gpt-accelerate", size, args.precision, args.steps)
    print(f"quickstart's model, {os.cpu_count()} cores, torch {torch.__version__}, tokens/s (spread)\n")
    print("| other processes | " + " | ".join(variables) + " |" + "\n|---" + "|---" * len(variables) + "|")
    for busy in args.busy:
        with company(busy):
            found = run_interleaved(dict.fromkeys(variables, setup), args.rounds, variables)
        cells = [spread([args.steps * size.tokens / one for one in taken], ",.0f") for taken, _ in found.values()]
        print(f"| {busy} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run(main)

"""Cost of a checkpoint that is written in the background, beside one that is written at once.

    python -m benchmarks.checkpoint_saving [--size gpt2-124m]

Interleaved: steps without a checkpoint, steps during which one is written in the background, and steps that wait until
one is written. Costs are for a checkpoint every 100 steps.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.command_line import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before torch is loaded

import torch
from accelerate import Accelerator
from transformers.utils import logging

from benchmarks.interleaved import spread
from benchmarks.training_step import SIZES, batches
from data_prep.common.command_line import ArgumentParser, run
from eval.common.devices import make_accelerator
from modeling import GPTModel
from training.checkpointing.checkpoint import Snapshot, take_snapshot, write_checkpoint
from training.checkpointing.store import RunState
from training.checkpointing.writer import Saver
from training.engine.distributed import describe_device
from training.engine.optimizer import make_optimizer
from training.engine.step import training_step
from training.settings.schema import OptimizerSettings

_EVERY = 100


@dataclass
class Bench:
    """A model in training, and a folder for its checkpoints."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    source: Iterator[Any]
    micro_batch: int
    checkpoints: Path
    saver: Saver
    state: RunState
    written: list[float] = field(default_factory=list)  # seconds of each background checkpoint until it is on the disk

    def step(self) -> float:
        """Runs a step and returns its seconds."""
        started = time.perf_counter()
        ids, labels = (tensor[: self.micro_batch].contiguous() for tensor in next(self.source)[0])
        batch = [{"input_ids": ids, "shift_labels": labels}]
        training_step(self.accelerator, self.model, self.optimizer, batch, max_grad_norm=1.0)["loss"].item()
        return time.perf_counter() - started

    def save_in_background(self) -> None:
        self.saver.save(self._snapshot())
        began = time.perf_counter()
        self.saver.tasks[-1].add_done_callback(lambda _: self.written.append(time.perf_counter() - began))

    def save_at_once(self) -> None:
        write_checkpoint(self._snapshot(), self.checkpoints)

    def _snapshot(self) -> Snapshot:
        snapshot = take_snapshot(self.accelerator, self.model, self.optimizer, self.state, {})
        assert snapshot is not None
        return snapshot

    def measure(self, save: Callable[[], None], steps: int) -> list[float]:
        """Saves, then runs steps, and returns the seconds of each; the first includes those of `save`."""
        self.state.step += 1
        started = time.perf_counter()
        save()
        before = time.perf_counter() - started
        seconds = [self.step() for _ in range(steps)]
        self.saver.wait()
        seconds[0] += before
        return seconds


@contextmanager
def make_bench(size_name: str, precision: str, micro_batch: int) -> Iterator[Bench]:
    """Creates a model and a temporary folder."""
    size = SIZES[size_name]
    accelerator = make_accelerator(mixed_precision=precision)
    torch.manual_seed(0)
    model = GPTModel(size.config).train()
    model, optimizer = accelerator.prepare(model, make_optimizer(model, OptimizerSettings(optim="adamw")))
    source, state = batches(size, accelerator.device), RunState(data={}, settings={}, num_processes=1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        saver = Saver(checkpoints, print)
        yield Bench(accelerator, model, optimizer, source, micro_batch, checkpoints, saver, state)
        saver.close()


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.checkpoint_saving", __doc__)
    parser.add_option("size", default="gpt2-124m", choices=list(SIZES), help="model")
    parser.add_option("precision", default="bf16", choices=["bf16", "no"], help="of the arithmetic")
    parser.add_option("micro_batch", type=int, default=1, help="sequences in a step")
    parser.add_option("steps", type=int, default=6, help="steps in a round")
    parser.add_option("rounds", type=int, default=3, help="rounds of measurements")
    args = parser.parse_args()
    logging.disable_progress_bar()
    with make_bench(args.size, args.precision, args.micro_batch) as bench:
        kinds = {"none": lambda: None, "in the background": bench.save_in_background, "at once": bench.save_at_once}
        bench.measure(bench.save_in_background, args.steps)  # warm-up
        measured: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds):
            for kind, save in kinds.items():
                measured[kind].append(bench.measure(save, args.steps))

    usual = statistics.median(second for seconds in measured["none"] for second in seconds)
    print(
        f"{args.size}, {args.micro_batch} x {SIZES[args.size].length} tokens a step, {args.precision}, "
        f"{describe_device(bench.accelerator.device)}, torch {torch.__version__}; a step takes {usual:.2f} s; in the "
        f"background a checkpoint is on the disk after {spread(bench.written[1:], '.1f')} s\n\n"
        f"| checkpoint | longest step / median step (spread) | cost of one every {_EVERY} steps |\n|---|---|---|"
    )
    base = [sum(seconds) for seconds in measured["none"]]
    for kind, rounds in measured.items():
        longest = [max(seconds) / usual for seconds in rounds]
        costs = [(sum(own) - other) / (_EVERY * usual) for own, other in zip(rounds, base, strict=True)]
        print(f"| {kind} | {spread(longest, '.2f')} | {spread(costs, '.1%')} |")


if __name__ == "__main__":
    run(main)

"""What a checkpoint costs a run while it is written in the background, and what it would cost written at once.

    python -m benchmarks.checkpoint_saving [--size gpt2-124m]

In turns: steps without a checkpoint, steps in the course of which one is written in the background, and steps of which
one waits until it is written. Costs are those of a checkpoint every 100 steps.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.interleaved import spread
from benchmarks.training_step import SIZES, batches
from data_prep.common.command_line import ArgumentParser, run
from eval.common.devices import make_accelerator
from modeling import GPTModel
from training.checkpointing.snapshot import take_snapshot, write_checkpoint
from training.checkpointing.storage import RunState
from training.checkpointing.writer import Saver
from training.engine.distributed import describe_device
from training.engine.optimizer import make_optimizer
from training.engine.step import training_step
from training.settings.schema import OptimizerSettings

_EVERY = 100


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.checkpoint_saving", __doc__)
    parser.add_option("size", default="gpt2-124m", choices=list(SIZES), help="model")
    parser.add_option("precision", default="bf16", choices=["bf16", "no"], help="of the arithmetic")
    parser.add_option("micro_batch", type=int, default=1, help="sequences in a step")
    parser.add_option("steps", type=int, default=6, help="steps in a turn")
    parser.add_option("rounds", type=int, default=3, help="turns of each")
    args = parser.parse_args()
    size = SIZES[args.size]
    logging.disable_progress_bar()
    accelerator = make_accelerator(mixed_precision=args.precision)
    torch.manual_seed(0)
    model = GPTModel(size.config).train()
    model, optimizer = accelerator.prepare(model, make_optimizer(model, OptimizerSettings()))
    source = batches(size, accelerator.device)
    state = RunState(data={}, settings={}, num_processes=1)

    def step() -> float:
        started = time.perf_counter()
        ids, labels = (tensor[: args.micro_batch].contiguous() for tensor in next(source)[0])
        batch = [{"input_ids": ids, "shift_labels": labels}]
        training_step(accelerator, model, optimizer, batch, max_grad_norm=1.0)["loss"].item()
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as name:
        checkpoints = Path(name) / "checkpoints"
        saver = Saver(checkpoints)
        written: list[float] = []

        def in_background() -> None:
            snapshot = take_snapshot(accelerator, model, optimizer, state, {})
            assert snapshot is not None
            saver.save(snapshot)
            began = time.perf_counter()
            saver.tasks[-1].add_done_callback(lambda _: written.append(time.perf_counter() - began))

        def at_once() -> None:
            snapshot = take_snapshot(accelerator, model, optimizer, state, {})
            assert snapshot is not None
            write_checkpoint(snapshot, checkpoints)

        def turn(save: Callable[[], None]) -> list[float]:
            """The seconds of each step, of the first of them those that the checkpoint takes included."""
            state.step += 1
            started = time.perf_counter()
            save()
            before = time.perf_counter() - started
            seconds = [step() for _ in range(args.steps)]
            saver.wait()
            seconds[0] += before
            return seconds

        kinds = {"none": lambda: None, "in the background": in_background, "at once": at_once}
        turn(in_background)  # what is compiled and allocated once
        turns: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds):
            for kind, save in kinds.items():
                turns[kind].append(turn(save))
        saver.close()

    usual = statistics.median(second for seconds in turns["none"] for second in seconds)
    print(
        f"{args.size}, {args.micro_batch} x {size.length} tokens a step, {args.precision}, "
        f"{describe_device(accelerator.device)}, torch {torch.__version__}; a step takes {usual:.2f} s; in the "
        f"background a checkpoint is on the disk after {spread(written[1:], '.1f')} s\n\n"
        f"| checkpoint | longest step, of the usual one (spread) | cost of one every {_EVERY} steps |\n|---|---|---|"
    )
    for kind, of_kind in turns.items():
        longest = [max(seconds) / usual for seconds in of_kind]
        base = [sum(seconds) for seconds in turns["none"]]
        costs = [(sum(own) - other) / (_EVERY * usual) for own, other in zip(of_kind, base, strict=True)]
        print(f"| {kind} | {spread(longest, '.2f')} | {spread(costs, '.1%')} |")


if __name__ == "__main__":
    run(main)

"""Speed of the data loader, beside the tokens that the quickstart's model consumes.

python -m benchmarks.data_loader
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable

from data_prep.common.command_line import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before torch is loaded

from data_prep.common.command_line import ArgumentParser, run
from training.engine.data import load_data
from training.settings.reading import parse_config
from training.settings.schema import TrainingConfig

_SEQUENCES = 64


def loader_rate(config: TrainingConfig, seconds: float) -> Callable[[], float]:
    """Returns a function that reads consecutive batches for a number of seconds and returns tokens per second."""
    batches = load_data(config).batches(config, "train")
    positions = itertools.count(step=_SEQUENCES)
    batches.sequences(next(positions), _SEQUENCES)  # warm-up: builds the index of the first window

    def measure() -> float:
        started, tokens = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            tokens += batches.sequences(next(positions), _SEQUENCES)["input_ids"].numel()
        return tokens / (time.perf_counter() - started)

    return measure


def model_rate(steps: int) -> float:
    """Returns the tokens per second of the quickstart's steps, without the first five."""
    from training.build_run import build_run
    from training.engine.optimizer import set_learning_rate
    from training.engine.step import training_step
    from training.run import stop_requests
    from training.train import log

    with tempfile.TemporaryDirectory() as folder, stop_requests(max_minutes=None) as stop:
        config = parse_config(["--output_dir", f"{folder}/quickstart"])
        with build_run(config, stop) as run:
            for number in range(5 + steps):
                if number == 5:
                    started = time.perf_counter()
                step = run.next_step()
                set_learning_rate(run.optimizer, step.learning_rate_factor)
                batches = run.micro_batches(step)
                results = training_step(
                    run.accelerator, run.model, run.optimizer, batches, config.optimizer.max_grad_norm
                )
                log(run, step, results)
            rate = steps * config.optimizer.batch_tokens / (time.perf_counter() - started)
    return rate


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.data_loader", __doc__)
    parser.add_option("data", nargs="+", default=["data/quickstart"], help="data folders, mixed if several")
    parser.add_option("repeats", type=int, default=5, help="rounds of measurements")
    parser.add_option("seconds", type=float, default=2.0, help="seconds of a measurement")
    parser.add_option("steps", type=int, default=50, help="steps of the quickstart's model")
    args = parser.parse_args()
    settings = {
        "256 tokens": ["--sequence_length", "256"],
        "256 tokens, within documents": ["--sequence_length", "256", "--document_mask", "true"],
        "1,024 tokens": ["--sequence_length", "1024"],
        "2,048 tokens": ["--sequence_length", "2048"],
    }
    configs = {name: parse_config(["--data", *args.data, *flags]) for name, flags in settings.items()}
    measures = {name: loader_rate(config, args.seconds) for name, config in configs.items()}
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(args.repeats):
        for name, measure in measures.items():
            rates[name].append(measure())
    model = model_rate(args.steps)
    print("\n| sequences of | M tokens/s (spread) | times what the quickstart consumes |\n|---|---|---|")
    for name, found in rates.items():
        median = statistics.median(found)
        spread = f"{min(found) / 1e6:.1f} to {max(found) / 1e6:.1f}"
        print(f"| {name} | {median / 1e6:.1f} ({spread}) | {median / model:,.0f} |")
    print(f"\nthe quickstart's model: {model:,.0f} tokens/s")


if __name__ == "__main__":
    run(main)

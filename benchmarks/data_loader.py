"""How fast the loader is, beside what the quickstart's model consumes.

python -m benchmarks.data_loader
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable

from data_prep.common.command_line import ArgumentParser, run
from training.engine.data import load_data
from training.settings.parsing import parse_config
from training.settings.schema import TrainingConfig

_SEQUENCES = 64


def loader_rate(config: TrainingConfig, seconds: float) -> Callable[[], float]:
    """A measurement of the loader's tokens a second: each call reads batches for so many seconds, from where the last
    one ended."""
    batches = load_data(config).batches(config, "train")
    positions = itertools.count(step=_SEQUENCES)
    batches.sequences(next(positions), _SEQUENCES)  # the index of the first window

    def measure() -> float:
        started, tokens = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            tokens += batches.sequences(next(positions), _SEQUENCES)["input_ids"].numel()
        return tokens / (time.perf_counter() - started)

    return measure


def model_rate(steps: int) -> float:
    """Tokens a second of the quickstart's own steps, the first few not counted."""
    from training.loop.stopping import stop_requests
    from training.setup import setup
    from training.train import train

    with tempfile.TemporaryDirectory() as folder, stop_requests(max_minutes=None) as stop:
        quickstart = setup(parse_config(["--runs_dir", folder]), stop)
        for _ in range(5):
            train(quickstart)
        started = time.perf_counter()
        for _ in range(steps):
            train(quickstart)
        rate = steps * quickstart.config.optimizer.batch_tokens / (time.perf_counter() - started)
        quickstart.close()
    return rate


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.data_loader", __doc__)
    parser.add_option("data", nargs="+", default=["data/quickstart"], help="data folders, a mixture if several")
    parser.add_option("repeats", type=int, default=5, help="rounds, in each of which every length is measured once")
    parser.add_option("seconds", type=float, default=2.0, help="of a measurement")
    parser.add_option("steps", type=int, default=50, help="of the quickstart's model")
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

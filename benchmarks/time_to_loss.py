"""Wall-clock time to the same loss, beside other trainers with their own recipes.

    python -m benchmarks.time_to_loss TEXT [--seeds 3] [--recipe CONFIG.yaml]

The last tenth of TEXT is held out. All but nanoGPT's demo, which takes characters, share a byte-level BPE that is
trained on the rest. Of each trainer but ours the best of three learning rates is found first. Then all take turns, one
seed after the other. Time counts from the start of the process, with imports, compilation and evaluations.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.interleaved import spread
from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import read_text
from data_prep.register import register
from data_prep.tokenization.tokenizer import Tokenizer, train_tokenizer
from training.settings.schema import OptimizerSettings

_HELD_OUT = 0.1
_DOCUMENT_BYTES = 8192  # of the training text, so that its order changes between epochs
_OURS = "gpt-accelerate"
_RATES = {  # around the best of each
    "build-nanogpt": (5e-4, 1e-3, 2e-3),
    "nanoGPT's CPU demo": (2e-3, 4e-3, 8e-3),
    "Trainer": (1e-3, 2e-3, 4e-3),
}


@dataclass
class Curve:
    """Bits per byte of the held-out text, and the seconds since the process started."""

    seconds: list[float] = field(default_factory=list)
    bits: list[float] = field(default_factory=list)

    def time_to(self, bits: float) -> float | None:
        """The seconds after which the bits per byte are first at most `bits`; None if they never are."""
        return next((s for s, found in zip(self.seconds, self.bits, strict=True) if found <= bits), None)


def prepare(text: str, vocab_size: int, folder: Path) -> None:
    """Writes the split text, and a data folder of its tokens, to an empty `folder`."""
    cut = int(len(text) * (1 - _HELD_OUT))
    cut = text.rfind("\n", 0, cut) + 1
    train, held_out = text[:cut], text[cut:]
    (folder / "train.txt").write_text(train, encoding="utf-8")
    (folder / "held_out.txt").write_text(held_out, encoding="utf-8")
    tokenizer = train_tokenizer([train], vocab_size)
    tokenizer.save(folder / "tokenizer")
    documents = [train[start : start + _DOCUMENT_BYTES] for start in range(0, len(train), _DOCUMENT_BYTES)]
    np.save(folder / "text_val_000000.npy", _encode(tokenizer, [held_out]))
    np.save(folder / "text_train_000001.npy", _encode(tokenizer, documents))
    register(folder)
    about = {"vocab_size": tokenizer.vocab_size, "held_out_bytes": len(held_out.encode())}
    (folder / "text.json").write_text(json.dumps(about))


def _encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    return tokenizer.encode(documents).astype(np.uint16)


def measure(words: list[str], folder: Path) -> Curve:
    """Runs a command that prints bits per byte, and notes when it does.

    Raises:
        UserError: if it fails.
    """
    curve, lines, started = Curve(), [], time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"([\d.]+) bits per byte", line):
            curve.seconds.append(time.perf_counter() - started)
            curve.bits.append(float(found[1]))
    if process.wait() != 0 or not curve.bits:
        raise UserError(f"{' '.join(words[1:4])} has failed: {''.join(lines[-5:])}")
    return curve


def command(name: str, folder: Path, steps: int, rate: float | None, seed: int, recipe: list[str]) -> list[str]:
    """The command that trains on the data in `folder`."""
    if name != _OURS:
        words = [name, str(folder), "--learning_rate", str(rate), "--seed", str(seed), "--steps", str(steps)]
        return [sys.executable, "-m", "benchmarks.other_trainers", *words]
    root = Path(__file__).parents[1]
    held_out = len(np.load(folder / "text_val_000000.npy"))
    output = tempfile.mkdtemp(prefix="run_", dir=folder)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(root / "accelerate_configs" / "cpu.yaml")]
    flags = ["--data", str(folder), "--seed", str(seed), "--output_dir", output, "--val_tokens", str(held_out)]
    flags += ["--max_steps", str(steps), "--eval_steps", str(max(1, steps // 10)), "--sample_every", "0"]
    return [sys.executable, *launch, str(root / "training" / "train.py"), *recipe, *flags]


def table(curves: dict[str, list[Curve]], rates: dict[str, float | None]) -> str:
    """Final losses and times, and how many times as fast ours is to the mean final loss of each."""
    lines = ["| | learning rate | bits per byte (spread) | seconds (spread) | ours to that loss | times as fast |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, runs in curves.items():
        final = statistics.fmean(one.bits[-1] for one in runs)
        cells = [name, f"{rates[name]:g}" if rates[name] else "", spread([one.bits[-1] for one in runs], ".3f")]
        cells.append(spread([one.seconds[-1] for one in runs], ".0f"))
        times = [one.time_to(final) for one in curves[_OURS]]
        if name == _OURS or None in times:
            cells += ["", ""] if name == _OURS else ["never", ""]
        else:
            ratios = [one.seconds[-1] / (ours or 1) for one, ours in zip(runs, times, strict=True)]
            cells += [spread([seconds or 0 for seconds in times], ".0f"), spread(ratios, ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.time_to_loss", __doc__)
    parser.add_argument("text", type=Path, help="UTF-8 text file")
    parser.add_option("seeds", type=int, default=3, help="runs of each trainer")
    parser.add_option("vocab_size", type=int, default=1024, help="of the BPE")
    parser.add_option("steps", type=int, default=800, help="of build-nanogpt and Trainer, 2,048 tokens each")
    parser.add_option("demo_steps", type=int, default=2000, help="of nanoGPT's demo, 768 characters each")
    ours = OptimizerSettings().max_steps
    parser.add_option("our_steps", type=int, default=ours, help="of gpt-accelerate, 2,048 tokens each")
    parser.add_option("recipe", help="settings of gpt-accelerate; those of the quickstart if not given")
    known = list(_RATES)
    parser.add_option("trainers", nargs="+", default=known, choices=known, help="those to compare with")
    args = parser.parse_args()
    recipe = [] if args.recipe is None else [str(Path(args.recipe).resolve())]
    steps = dict.fromkeys(_RATES, args.steps) | {"nanoGPT's CPU demo": args.demo_steps, _OURS: args.our_steps}
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(read_text(args.text), args.vocab_size, folder)
        rates: dict[str, float | None] = {_OURS: None}
        for trainer in args.trainers:
            found = {}
            for rate in _RATES[trainer]:
                curve = measure(command(trainer, folder, steps[trainer], rate, 0, recipe), root)
                found[rate] = curve.bits[-1]
                print(f"{trainer}, learning rate {rate:g}: {curve.bits[-1]:.4f} bits per byte", flush=True)
            rates[trainer] = min(found, key=lambda rate: found[rate])
        curves: dict[str, list[Curve]] = {trainer: [] for trainer in rates}
        for seed in range(1, args.seeds + 1):
            for trainer in curves:
                words = command(trainer, folder, steps[trainer], rates[trainer], seed, recipe)
                curves[trainer].append(measure(words, root))
                last = curves[trainer][-1]
                print(f"{trainer}, seed {seed}: {last.bits[-1]:.4f} after {last.seconds[-1]:.0f} s", flush=True)
    print("\n" + table(curves, rates))


if __name__ == "__main__":
    run(main)

"""Compare settings at a fixed budget: runs in turn, a table with standard errors and p-values, curves, verdicts.

python -m training.compare --vary optim=adamw,muon --budget 2m
python -m training.compare BASE.yaml --vary optim=adamw,muon learning_rate=1e-3,3e-3 --seeds 3 --budget 500k-tokens

Every combination of the values is a variant; the first one is what the others are compared with. Several BASE files are
variants too. The same command continues an interrupted comparison; with more --seeds it adds runs.
"""

import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import read_text
from data_prep.common.locks import locked
from eval.reporting.records import Record, read_run
from training.checkpointing.store import checkpoint_folder, is_checkpoint
from training.comparison import Runs, Variant, make_variants, parse_budget, summary, write_results

_CALIBRATION_MINUTES = 0.5


def finished_run(variant: Variant, folder: Path) -> Record | None:
    """Record of a run that reached its last step with a finite validation loss; None otherwise."""
    if not is_checkpoint(checkpoint_folder(folder / "checkpoints", variant.max_steps)):
        return None
    record = read_run(folder)
    losses = record.curves.get("val_loss")
    return record if losses is not None and losses.steps[-1] == variant.max_steps else None


def train(variant: Variant, folder: Path, flags: list[str], launch: list[str]) -> str | None:
    """Trains in `folder`, or continues, logging next to it; returns the problem if it fails.

    Args:
        flags: settings beside those of the variant.
        launch: options of `accelerate launch`.
    """
    spec = find_spec("training.train")
    assert spec is not None and spec.origin is not None
    words = [sys.executable, "-m", "accelerate.commands.launch", "-q", *launch, spec.origin, *variant.arguments, *flags]
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with open(log, "ab") as output:
        words += ["--auto_resume", "--output_dir", str(folder)]
        process = subprocess.Popen(words, stdout=output, stderr=output)
        try:
            code = process.wait()
        except BaseException as stop:
            if isinstance(stop, SystemExit):  # Ctrl-C reaches the run as well, SIGTERM does not
                process.terminate()
            process.wait()
            raise
    if code == 0:
        return None
    last = next((line for line in reversed(read_text(log, "replace").splitlines()) if line.strip()), "")
    return f"{folder.name} ended with code {code} ({last.strip()}); see {log}"


def steps_in(minutes: float, variant: Variant, folder: Path, launch: list[str]) -> int:
    """Number of steps that fit into minutes of training, from the speed of a short run in `folder` (`UserError` if that
    fails)."""
    limit, metrics = _CALIBRATION_MINUTES, folder / "metrics.jsonl"
    while not metrics.exists() or "tokens_per_second" not in (curves := read_run(folder).curves):
        print(f"{variant.name}: measuring its speed", flush=True)
        if problem := train(variant, folder, ["--max_minutes", str(limit), "--sample_every", "0"], launch):
            raise UserError(problem)
        limit *= 2  # it counts from the start of the process, preparations included
    tokens = 60 * minutes * statistics.median(curves["tokens_per_second"].values)
    return variant.config("--max_tokens", f"{tokens:.0f}").max_steps


def turns(variants: list[Variant], seeds: int) -> Iterator[tuple[Variant, int]]:
    """Order of the runs: all variants with one seed, then with the next in reverse, so that a drift in the machine's
    speed cancels."""
    for seed in range(1, 1 + seeds):
        for variant in variants[:: 1 if seed % 2 else -1]:
            yield variant, seed


def compare(variants: list[Variant], seeds: int, folder: Path, launch: list[str]) -> list[Runs]:
    """Trains the missing runs and returns the runs of each variant."""
    results = {variant.name: Runs(variant.name, [], []) for variant in variants}
    for number, (variant, seed) in enumerate(turns(variants, seeds), start=1):
        run_folder, problem = folder / variant.name / f"seed_{seed}", None
        title = f"{number} of {seeds * len(variants)}  {variant.name}, seed {seed}"
        if (record := finished_run(variant, run_folder)) is None:
            print(f"{title}: {variant.max_steps} steps ...", flush=True)
            flags = ["--seed", str(seed), "--max_steps", str(variant.max_steps)]
            problem = train(variant, run_folder, flags, launch)
            record = finished_run(variant, run_folder) if problem is None else None
        if record is None:
            shown = problem or f"seed_{seed} was stopped, or its validation loss is not finite"
            results[variant.name].failures.append(shown)
        else:
            shown = f"validation loss {record.last('val_loss'):.4f}"
            results[variant.name].records.append(record)
        print(f"{title}: {shown}", flush=True)
    return list(results.values())


def main() -> None:
    parser = ArgumentParser("python -m training.compare", __doc__)
    parser.add_argument("bases", nargs="*", metavar="BASE.yaml", help="settings; those of the quickstart if not given")
    help_vary = "NAME=VALUE,VALUE of a setting to compare; with one VALUE, it is set for all"
    parser.add_option("vary", nargs="+", default=[], metavar="NAME=VALUES", help=help_vary)
    parser.add_option("seeds", type=int, default=3, help="runs of each variant")
    parser.add_option("budget", default="2m", help="of each run: minutes of training, tokens or steps (500k-tokens)")
    parser.add_option("output_dir", type=Path, default=Path("runs/comparison"), help="folder of the comparison")
    parser.add_option("config_file", help="Accelerate config of the runs; that of the machine if not given")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UserError(f"seeds={args.seeds} must be at least 1")
    if args.config_file is not None and not Path(args.config_file).is_file():
        raise UserError(f"config_file={args.config_file!r}: no such file; name one of accelerate_configs/")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    budget = parse_budget(args.budget)
    variants = make_variants(args.bases, args.vary, budget)
    launch = [] if args.config_file is None else ["--config_file", args.config_file]
    with locked(args.output_dir):
        for variant in variants:
            folder = args.output_dir / variant.name
            if budget.unit == "minutes":
                variant.max_steps = steps_in(budget.amount, variant, folder / "speed", launch)
            for seed in range(1, 1 + args.seeds):
                variant.check_run(folder / f"seed_{seed}")
        runs = compare(variants, args.seeds, args.output_dir, launch)
        command = shlex.join(["python", "-m", "training.compare", *sys.argv[1:]])
        report = write_results(runs, args.output_dir, command, budget)
    print(f"\n{summary(runs, budget)}\n\n{report}")
    if failed := [one.name for one in runs if one.failures]:
        raise UserError(f"runs of {', '.join(failed)} failed; the same command tries them again")


if __name__ == "__main__":
    run(main)

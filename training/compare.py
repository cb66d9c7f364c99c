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

from data_prep.common.command_line import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import read_text
from data_prep.common.locks import locked
from eval.reporting.run_records import Record, read_run
from training.checkpointing.storage import checkpoint_folder, is_checkpoint
from training.comparison.plan import Plan, Variant, make_plan, open_plan, parse_budget
from training.comparison.results import Runs, summary, write_results

_CALIBRATIONS = 3  # runs of each variant that find how many steps fit into a budget of minutes
_CALIBRATION_MINUTES, _CALIBRATION_STEPS = 0.5, 30
_FIRST_SEED = 1


def finished_run(variant: Variant, folder: Path) -> Record | None:
    """The record of a run that is at its end with a finite validation loss; None for another."""
    assert variant.max_steps is not None
    if not is_checkpoint(checkpoint_folder(folder / "checkpoints", variant.max_steps)):
        return None
    record = read_run(folder)
    losses = record.curves.get("val_loss")
    return record if losses is not None and losses.steps[-1] == variant.max_steps else None


def train(variant: Variant, folder: Path, flags: list[str], launch: list[str]) -> str | None:
    """Trains in `folder`, with the output in a log beside it; returns the problem if it fails.

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
        process = subprocess.Popen([*words, "--output_dir", str(folder)], stdout=output, stderr=output)
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


def measure_speed(variant: Variant, folder: Path, launch: list[str]) -> float:
    """The tokens per second of a short run, which goes on until it has some steps.

    Raises:
        UserError: if it fails.
    """
    minutes = _CALIBRATION_MINUTES  # they count from the start of the process, preparations included
    while True:
        flags = ["--max_minutes", str(minutes), "--sample_every", "0", "--auto_resume"]
        if (problem := train(variant, folder, flags, launch)) is not None:
            raise UserError(problem)
        metrics = folder / "metrics.jsonl"
        curves = read_run(folder).curves if metrics.exists() and metrics.stat().st_size else {}
        speeds = curves["tokens_per_second"].values if "tokens_per_second" in curves else []
        finished = is_checkpoint(checkpoint_folder(folder / "checkpoints", variant.config().max_steps))
        if speeds and (finished or len(speeds) >= _CALIBRATION_STEPS):
            return statistics.median(speeds)
        minutes *= 2


def convert_minutes(plan: Plan, folder: Path, launch: list[str]) -> None:
    """Finds the steps of each variant that fit into a budget of minutes, by short runs in turn; the fastest counts, as
    other work on the machine can only slow them."""
    wanted = {name: variant for name, variant in plan.variants.items() if variant.max_steps is None}
    fastest = dict.fromkeys(wanted, 0.0)
    for number in range(1, _CALIBRATIONS + 1):
        for name, variant in wanted.items():
            print(f"{name}: measuring its speed, {number} of {_CALIBRATIONS}", flush=True)
            fastest[name] = max(fastest[name], measure_speed(variant, folder / name / f"speed_{number}", launch))
    for name, variant in wanted.items():
        tokens = round(60 * plan.budget.amount * fastest[name])
        variant.max_steps = variant.config("--max_tokens", str(tokens)).max_steps


def turns(plan: Plan, seeds: int) -> Iterator[tuple[str, Variant, int]]:
    """The runs in their order: all variants with one seed, then with the next in reverse, so that a drift of the
    machine's speed cancels."""
    for seed in range(_FIRST_SEED, _FIRST_SEED + seeds):
        items = list(plan.variants.items())
        for name, variant in items if (seed - _FIRST_SEED) % 2 == 0 else reversed(items):
            yield name, variant, seed


def compare(plan: Plan, seeds: int, folder: Path, launch: list[str]) -> list[Runs]:
    """Trains what is not trained yet, and returns the runs of each variant."""
    results = {name: Runs(name, [], []) for name in plan.variants}
    for number, (name, variant, seed) in enumerate(turns(plan, seeds), start=1):
        run_folder, problem = folder / name / f"seed_{seed}", None
        title = f"{number} of {seeds * len(plan.variants)}  {name}, seed {seed}"
        if (record := finished_run(variant, run_folder)) is None:
            print(f"{title}: {variant.max_steps} steps ...", flush=True)
            flags = ["--seed", str(seed), "--max_steps", str(variant.max_steps), "--auto_resume"]
            problem = train(variant, run_folder, flags, launch)
            record = finished_run(variant, run_folder) if problem is None else None
        if record is None:
            results[name].failures.append(problem or f"seed_{seed} was stopped, or its validation loss is not finite")
        else:
            results[name].records.append(record)
        shown = f"validation loss {record.last('val_loss'):.4f}" if record else results[name].failures[-1]
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
    wanted = make_plan(args.bases, args.vary, parse_budget(args.budget))
    launch = [] if args.config_file is None else ["--config_file", args.config_file]
    with locked(args.output_dir):
        saved = open_plan(wanted, args.output_dir)
        plan = saved.only(wanted.variants)
        saved.save(args.output_dir)
        convert_minutes(plan, args.output_dir, launch)
        saved.save(args.output_dir)
        runs = compare(plan, args.seeds, args.output_dir, launch)
        command = shlex.join(["python", "-m", "training.compare", *sys.argv[1:]])
        report = write_results(runs, args.output_dir, command, wanted.budget)
    print(f"\n{summary(runs, wanted.budget)}\n\n{report}")
    if failed := [one.name for one in runs if one.failures]:
        raise UserError(f"runs of {', '.join(failed)} failed; the same command tries them again")


if __name__ == "__main__":
    run(main)

"""Show batch size and learning rate of a run over its steps.

    python -m training.plot_schedule [CONFIG.yaml] [--name value ...] [--plot FILE.png]

Prints both where they begin or end to change, and draws them.
"""

from pathlib import Path

from data_prep.common.command_line import ArgumentParser, raise_all, run
from training.settings.reading import parse_config, schedule_problems
from training.settings.schedule import BatchPlan, Schedule


def corners(plan: BatchPlan, schedule: Schedule, max_steps: int) -> list[int]:
    """Steps where batch size or learning rate start or stop changing, plus the first, the middle and the last."""
    steps = [schedule.warmup]
    if schedule.name == "wsd":
        steps.append(schedule.total - schedule.cooldown)
    elif schedule.name != "constant":
        steps.append(schedule.decay)
    if schedule.unit == "tokens":
        steps = [plan.steps(place) for place in steps]
    steps += [0, plan.steps(plan.ramp_tokens), max_steps // 2]
    return sorted({min(place, max_steps - 1) for place in [*steps, max_steps]})


def main() -> None:
    note = "The settings are those of training/train.py, whose --help lists them."
    parser = ArgumentParser("python -m training.plot_schedule", f"{__doc__}\n{note}")
    parser.usage = f"{parser.prog} [CONFIG.yaml] [--name value ...] [--plot FILE]"
    parser.add_option("plot", type=Path, metavar="FILE", help="picture to draw it into")
    args, words = parser.parse_known_args()
    config = parse_config(words)
    raise_all(list(schedule_problems(config)))
    plan, schedule, end, peak = config.batch_plan, config.schedule, config.max_steps, config.optimizer.learning_rate

    def row(step: int) -> tuple[int, int, int, float]:
        consumed = plan.tokens(step)
        size = plan.size(consumed)
        return step, consumed, size, peak * schedule.at(step, consumed, size)

    print(f"{'step':>10}{'tokens before it':>20}{'batch in tokens':>18}{'learning rate':>16}")
    for step in corners(plan, schedule, end):
        print("{:>10,}{:>20,}{:>18,}{:>16.3e}".format(*row(step)))
    print(f"{end:,} steps, {plan.tokens(end):,} tokens")
    if args.plot is not None:
        draw([row(step) for step in sorted({round(i * (end - 1) / 400) for i in range(401)})], schedule.name, args.plot)
        print(args.plot)


def draw(rows: list[tuple[int, int, int, float]], name: str, file: Path) -> None:
    """Plot learning rate and batch against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    _, tokens, batches, rates = zip(*rows, strict=True)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    rate, batch = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    rate.plot(tokens, rates)
    rate.set_ylabel("learning rate")
    rate.set_title(f"{name}, {rows[-1][0] + 1:,} steps")
    batch.plot(tokens, batches, color="tab:orange")
    batch.set(ylabel="batch [tokens]", xlabel="tokens", ylim=(0, 1.1 * max(batches)))
    batch.xaxis.set_major_formatter(EngFormatter())
    batch.yaxis.set_major_formatter(EngFormatter())
    for axes in (rate, batch):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    run(main)

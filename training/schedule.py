"""How large a step's batch is, and its learning rate: pure functions of the tokens and steps before it.

    python -m training.schedule [CONFIG.yaml] [--name value ...] [--plot FILE.png]

prints both at the corners of a run's schedule, and draws them.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.cli import ArgumentParser, run

ScheduleName = Literal["cosine", "linear", "constant", "wsd"]


@dataclass(frozen=True)
class BatchPlan:
    """The tokens of each step: `batch_tokens`, after a linear ramp if there is one (GPT-3, appendix B: from 32k tokens
    to the full value over the first 4 to 12 billion).

    A batch is a whole multiple of the first, which must divide the last: so it does not depend on the number of
    processes, and with it neither does the order of data.

    Attributes:
        batch_tokens: tokens of a step after the ramp.
        ramp_start: tokens of the first step.
        ramp_tokens: tokens over which the batch grows; 0 for no ramp.
    """

    batch_tokens: int
    ramp_start: int = 1
    ramp_tokens: int = 0

    def size(self, consumed: int) -> int:
        """Tokens of the step that begins after `consumed` tokens."""
        if consumed >= self.ramp_tokens:
            return self.batch_tokens
        increments = (self.batch_tokens - self.ramp_start) * consumed // (self.ramp_tokens * self.ramp_start)
        return self.ramp_start * (1 + increments)

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        done, consumed = self._ramp(steps, self.ramp_tokens)
        return consumed + (steps - done) * self.batch_tokens

    def steps(self, tokens: int) -> int:
        """The fewest steps that have at least `tokens` tokens."""
        done, consumed = self._ramp(tokens, min(tokens, self.ramp_tokens))
        return done + -(-max(0, tokens - consumed) // self.batch_tokens)

    def _ramp(self, steps: int, tokens: int) -> tuple[int, int]:
        """Steps and tokens once there are `steps` or `tokens` of them, within the ramp."""
        done = consumed = 0
        while done < steps and consumed < tokens:
            consumed += self.size(consumed)
            done += 1
        return done, consumed


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a fraction of its peak. All lengths are in one unit, steps or tokens.

    It rises linearly over `warmup`, the first step at `size / warmup`. Then

        cosine    half a cosine down to `min_ratio` at `decay`, constant from there (GPT-3, appendix B)
        linear    a straight line down to `min_ratio` at `decay`, constant from there
        constant  stays
        wsd       stays until the last `cooldown` of `total`, then a straight line down to `min_ratio`
                  (warmup-stable-decay: MiniCPM, arXiv:2404.06395, section 4; Hägele et al., arXiv:2405.18392)

    Attributes:
        unit: what the lengths are counted in.
        decay: where cosine and linear end, from the beginning of the run.
        total: the length of the run.
    """

    name: ScheduleName
    unit: Literal["steps", "tokens"]
    warmup: int
    decay: int
    cooldown: int
    total: int
    min_ratio: float

    def factor(self, done: int, size: int) -> float:
        """The fraction of the peak for the step that begins after `done` and is `size` long (1 in steps)."""
        if done < self.warmup:
            return min(1.0, (done + size) / self.warmup)
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            begin, end = self.total - self.cooldown, self.total
        else:
            begin, end = self.warmup, self.decay
        if done < begin:
            return 1.0
        progress = min(1.0, (done - begin) / (end - begin)) if end > begin else 1.0
        falling = 0.5 * (1 + math.cos(math.pi * progress)) if self.name == "cosine" else 1 - progress
        return self.min_ratio + (1 - self.min_ratio) * falling

    def at(self, step: int, consumed: int, size: int) -> float:
        """The fraction of the peak for step number `step`, which begins after `consumed` tokens and has `size`."""
        return self.factor(step, 1) if self.unit == "steps" else self.factor(consumed, size)


def corners(plan: BatchPlan, schedule: Schedule, max_steps: int) -> list[int]:
    """The steps at which batch or learning rate begin or end to change, the first, the middle and the last."""
    places = [schedule.warmup]
    if schedule.name == "wsd":
        places.append(schedule.total - schedule.cooldown)
    elif schedule.name != "constant":
        places.append(schedule.decay)
    if schedule.unit == "tokens":
        places = [plan.steps(place) for place in places]
    places += [0, plan.steps(plan.ramp_tokens), max_steps // 2]
    return sorted({min(place, max_steps - 1) for place in [*places, max_steps]})


def main() -> None:
    from training.checks import raise_all, schedule_problems
    from training.config import parse_config

    parser = ArgumentParser("python -m training.schedule", __doc__)
    parser.usage = f"{parser.prog} [CONFIG.yaml] [--name value ...] [--plot FILE]"
    parser.epilog += "\nThe settings are those of training/train.py, whose --help lists them."
    parser.add_option("plot", type=Path, metavar="FILE", help="picture to draw it into")
    args, words = parser.parse_known_args()
    config = parse_config(words)
    raise_all(schedule_problems(config))
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

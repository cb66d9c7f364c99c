"""Comparisons: variants, budget, statistics, table and curves."""

import itertools
import json
import re
import statistics
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.common.command_line import UserError, listed, raise_all
from data_prep.common.files import write_text
from data_prep.common.schema import read_yaml
from eval.reporting.plots import COLORS, new_figure, save_figure
from eval.reporting.records import Curve, Record
from eval.reporting.sections import number, table, write_page

if TYPE_CHECKING:
    from training.settings.schema import TrainingConfig


_UNITS = {"m": "minutes", "min": "minutes", "minutes": "minutes", "tokens": "tokens", "steps": "steps"}
# The comparison decides these.
_RESERVED = (
    *("max_steps", "max_tokens", "max_minutes", "seed", "output_dir", "run_name"),
    *("resume_from_checkpoint", "auto_resume", "preflight", "push_to_hub"),
)


class Budget(NamedTuple):
    """Budget of each run: minutes of training steps on this machine, tokens, or steps."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:,g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """Reads `2m`, `500k-tokens`, `800-steps` and the like (`UserError` for another form, and for nothing)."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kMG]?)[- ]?([a-z]+)", text)
    unit = _UNITS.get(match[3]) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise UserError(f"budget={text!r}: give minutes, tokens or steps, as in 2m, 500k-tokens or 800-steps")
    return Budget(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]], unit)


@dataclass
class Variant:
    """Settings to compare with others.

    Attributes:
        arguments: of the trainer: `[CONFIG.yaml] --name value ...`.
        max_steps: length of each run; for a budget of minutes that of its configuration, until they are converted.
    """

    name: str
    arguments: list[str]
    max_steps: int = 0

    def config(self, *more: str) -> "TrainingConfig":
        """Settings of a run with additional arguments (`UserError` with all problems)."""
        from training.settings.reading import load_config

        return load_config([*self.arguments, *more], 1)

    def check_run(self, folder: Path) -> None:
        """Raises `UserError` if the run in a folder has other settings than this variant."""
        if not (folder / "config.yaml").exists():
            return
        saved = read_yaml(folder / "config.yaml")
        settings = json.loads(json.dumps(self.config().to_dict()))
        expected = {name: value for name, value in settings.items() if name not in _RESERVED and value is not None}
        expected["max_steps"] = self.max_steps
        changed = [name for name, value in expected.items() if name in saved and saved[name] != value]
        if problems := [f"{name} was {saved[name]}, now {expected[name]}" for name in changed]:
            raise UserError(f"{folder} is of another comparison: {listed(problems)}; choose another --output_dir")


def make_variants(bases: list[str], vary: list[str], budget: Budget) -> list[Variant]:
    """Combines each base with one value of each varied setting.

    Args:
        bases: YAML files; none for the defaults.
        vary: `NAME=VALUE,VALUE,...`; a single value is that of all variants.

    Raises:
        UserError: with all problems of all variants.
    """
    grid = _grid(vary)
    length = [] if budget.unit == "minutes" else [f"--max_{budget.unit}", f"{budget.amount:.0f}"]
    variants: dict[str, Variant] = {}
    problems = []
    for base, values in itertools.product(bases or [""], itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        parts = [Path(base).stem] if len(bases) > 1 else []
        parts += [f"{name}={value}" for name, value in chosen.items() if len(grid[name]) > 1]
        name = ",".join(parts).replace("/", "_") or "base"
        arguments = [base] if base else []
        arguments += [word for setting, value in chosen.items() for word in (f"--{setting}", value)]
        if name in variants:
            problems.append(f"{name}: two variants have this name; rename a file, or leave a value out")
        variants[name] = variant = Variant(name, [*arguments, "--push_to_hub", "false"])
        try:
            variant.max_steps = variant.config(*length).max_steps
        except UserError as error:
            problems.append(f"{name}: {error}")
    raise_all(problems)
    return list(variants.values())


def _grid(vary: list[str]) -> dict[str, list[str]]:
    grid: dict[str, list[str]] = {}
    problems = []
    for word in vary:
        name, _, values = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        listed_values = values.split(",")
        if not name or not all(listed_values):
            problems.append(f"vary={word!r}: give NAME=VALUE,VALUE")
        elif name in _RESERVED:
            problems.append(f"vary={word!r}: the comparison itself sets {name}; leave it out")
        grid[name] = grid.get(name, []) + listed_values
    raise_all(problems)
    return grid


REPORT_NAME, PAGE_NAME, PICTURE_NAME = "comparison.md", "comparison.html", "comparison.png"
SIGNIFICANCE = 0.05  # of the p-values, after the correction for several variants
_EQUAL = 0.1  # largest difference of minutes that are called the same, as a part of the first's
_HEADING = ("", "seeds", "validation loss", "standard error", "difference", "p", "tokens", "tokens/s", "minutes")


@dataclass(frozen=True)
class Runs:
    """Finished runs of a variant, one per seed, and the reasons why others failed."""

    name: str
    records: list[Record]
    failures: list[str]

    @property
    def losses(self) -> list[float]:
        """Final validation losses, in nats per token."""
        return [record.curves["val_loss"].values[-1] for record in self.records]


def p_values(first: list[float], others: list[list[float]]) -> list[float | None]:
    """P-value of each of `others` against `first` by Welch's t-test (Welch 1947, Biometrika 34), corrected for their
    number (Benjamini and Hochberg 1995). None with fewer than two values; 1 for equal ones."""
    from scipy.stats import false_discovery_control, ttest_ind

    raw = {}
    for index, values in enumerate(others):
        if len(values) < 2 or len(first) < 2:
            continue
        if values == first:
            raw[index] = 1.0
        elif len(set(first)) == len(set(values)) == 1:
            raw[index] = 0.0  # neither varies, and they differ
        else:
            raw[index] = float(ttest_ind(first, values, equal_var=False).pvalue)
    corrected = false_discovery_control(list(raw.values())) if raw else []
    found = dict(zip(raw, map(float, corrected), strict=True))
    return [found.get(index) for index in range(len(others))]


def verdict(first: Runs, other: Runs, p: float | None) -> str:
    """Better, worse, or not told apart, as far as the seeds allow."""
    if other.failures or first.failures:
        return "failed" if other.failures else "the first failed"
    if p is None:
        return "one seed tells nothing"
    if p >= SIGNIFICANCE:
        return "not told apart"
    return "better" if statistics.fmean(other.losses) < statistics.fmean(first.losses) else "worse"


def summary(runs: list[Runs], budget: Budget) -> str:
    """Table of all variants, and a verdict on each but the first."""
    first, others = runs[0], runs[1:]
    target = statistics.fmean(first.losses) if first.losses else None
    rows, lines = [[*_cells(first, None, None, target), ""]], []
    for one, p in zip(others, p_values(first.losses, [one.losses for one in others]), strict=True):
        judged = verdict(first, one, p)
        rows.append([*_cells(one, target, p, target), judged])
        than = f" than {first.name}" if judged in ("better", "worse") else ""
        lines.append(f"{one.name}: {judged}{than}{'' if p is None else f' (p = {p:.2g})'}")
        if budget.unit == "minutes" and one.records and first.records:
            ours, theirs = (_mean_minutes(each.records).values[-1] for each in (one, first))
            if abs(ours - theirs) > _EQUAL * theirs:  # the machine was not as fast as when the steps were chosen
                remedy = "compare on a quieter machine, or by steps"
                lines.append(f"{one.name}: its runs took {ours:.2f} minutes, not {theirs:.2f}: {remedy}")
    lines += [f"{one.name}: {failure}" for one in runs for failure in one.failures]
    heading = [*_HEADING, f"minutes to {number(target, '.4f')}", "verdict"]
    return "\n\n".join([table(heading, rows), "\n".join(f"- {line}" for line in lines)]).rstrip()


def _cells(one: Runs, reference: float | None, p: float | None, target: float | None) -> list[str]:
    if not one.records:
        return [one.name, "0", *[""] * (len(_HEADING) - 1)]
    losses, minutes = one.losses, _mean_minutes(one.records)
    mean = statistics.fmean(losses)
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else None
    speeds = [statistics.median(record.curves["tokens_per_second"].values) for record in one.records]
    reached = None if target is None else time_to(target, _mean_curve(one.records, "val_loss"), minutes)
    return [
        one.name,
        str(len(losses)),
        f"{mean:.4f}",
        number(error, ".4f"),
        number(None if reference is None else mean - reference, "+.4f"),
        number(p, ".2g"),
        f"{one.records[0].curves['tokens'].values[-1]:,.0f}",
        f"{statistics.median(speeds):,.0f}",
        f"{minutes.values[-1]:.2f}",
        number(reached, ".2f"),
    ]


def _mean_curve(records: list[Record], metric: str) -> Curve:
    """Mean of a metric over runs, at the steps they have in common."""
    curves = [record.curves[metric] for record in records]
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    return Curve(steps, [statistics.fmean(curve.at(step) for curve in curves) for step in steps])


def _mean_minutes(records: list[Record]) -> Curve:
    """Mean minutes of training steps after each step."""
    seconds = [curve for record in records if (curve := record.seconds()) is not None]
    steps = seconds[0].steps
    return Curve(steps, [statistics.fmean(curve.at(step) for curve in seconds) / 60 for step in steps])


def time_to(target: float, loss: Curve, minutes: Curve) -> float | None:
    """Minutes until a loss first reaches `target`, linearly interpolated; None if it never does."""
    for (before, higher), (after, lower) in pairwise(zip(loss.steps, loss.values, strict=True)):
        if lower <= target < higher:
            return minutes.at(before + (after - before) * (higher - target) / (higher - lower))
    return None


def write_results(runs: list[Runs], folder: Path, command: str, budget: Budget) -> Path:
    """Writes the report of a comparison and its plot; returns the path of the page with both."""
    shown, picture = [one for one in runs if one.records], folder / PICTURE_NAME
    if shown:
        save_figure(_plot(shown), picture)
    text = (
        f"# Comparison at {budget} a run\n\n```bash\n{command}\n```\n\n{summary(runs, budget)}\n\n"
        f"Losses are means over the seeds. p is that of Welch's t-test against the first line, corrected for the "
        f"number of variants; below {SIGNIFICANCE:g} they are told apart. Minutes are those of training steps.\n\n"
        f"![Validation loss]({PICTURE_NAME})\n"
    )
    write_text(folder / REPORT_NAME, text)
    write_page(folder / PAGE_NAME, text, [picture] if shown else [])
    return folder / PAGE_NAME


def _plot(runs: list[Runs]) -> Any:
    """Plots mean validation losses over tokens and minutes, each with a band from its lowest to its highest run."""
    figure, panels = new_figure(2, 10.4, 4.6, sharey=True)
    ends = []
    for one, color in zip(runs, cycle(COLORS), strict=False):
        mean = _mean_curve(one.records, "val_loss")
        all_values = [[record.curves["val_loss"].at(step) for record in one.records] for step in mean.steps]
        tokens = one.records[0].tokens()
        assert tokens is not None
        for panel, x in zip(panels, (tokens, _mean_minutes(one.records)), strict=True):
            at = [x.at(step) for step in mean.steps]
            band = list(map(min, all_values)), list(map(max, all_values))
            panel.fill_between(at, *band, color=color, alpha=0.2, linewidth=0)
            panel.plot(at, mean.values, color=color, label=f"{one.name}: {mean.values[-1]:.3f}", linewidth=1.5)
        ends += mean.values[len(mean.values) // 4 :]
    for panel, label in zip(panels, ("tokens", "minutes of training steps"), strict=True):
        panel.set_xlabel(label)
    margin = 0.05 * (max(ends) - min(ends))
    panels[0].set_ylim(min(ends) - margin, max(ends) + margin)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(fontsize=8, framealpha=0.9)
    return figure

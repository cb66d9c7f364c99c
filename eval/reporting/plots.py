"""Plots of runs: an overview, loss, HellaSwag, and how the training went."""

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import redact
from eval.reporting.reference_results import ReferenceResult, of_the_same_size
from eval.reporting.run_records import Curve, Record, Sample

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
_REFERENCE_COLORS = {"GPT-2": "#555555", "GPT-3": "#999999", "build-nanogpt": "#b8860b"}
# Values of the x axis at steps; None if a run did not log them.
_Axis = Callable[[Record, Sequence[int]], np.ndarray | None]
_AXES: dict[str, _Axis] = {
    "step": lambda record, steps: np.asarray(steps, dtype=float),
    "tokens": lambda record, steps: _interpolate(record.tokens(), steps),
    "time": lambda record, steps: _interpolate(record.seconds(), steps),
}
_SAMPLE_LINES, _SAMPLE_COLUMNS = 7, 31  # of two samples side by side, legible on a phone


def plot_all(records: list[Record], folder: Path) -> list[Path]:
    """Saves the plots for which the records have data to `folder`, and returns their paths."""
    figures = {
        "overview.png": _plot_overview(records[0]) if len(records) == 1 else None,
        "loss.png": _plot_loss(records),
        "hellaswag.png": _plot_hellaswag(records),
        "training.png": _plot_training(records),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(path := folder / name)
            save_figure(figure, path)
    return paths


def save_figure(figure: Any, path: Path) -> None:
    """Saves a matplotlib figure completely or not at all."""
    temporary = path.with_name(f".{path.stem}.partial.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # a sample's letter that matplotlib's font lacks
        figure.savefig(temporary, dpi=130)
    temporary.rename(path)


def _plot_overview(record: Record) -> Any:
    """Plots losses over steps, above samples of the first and of the last step that has some; None without both."""
    if not record.samples or not _finite_losses([record]):
        return None
    steps = dict.fromkeys([record.samples[0].step, record.samples[-1].step])
    columns = {step: _excerpts([sample for sample in record.samples if sample.step == step]) for step in steps}
    rows = (2.8, 0.17 * (2 + max(text.count("\n") + 1 for text in columns.values())))
    figure, (losses, below) = _figure("Overview", [record], 1, width=6, height=sum(rows), rows=rows)
    _plot_losses(losses, "step", [record])
    _finish_losses(losses, [record])
    below.set_axis_off()
    for (step, text), left in zip(columns.items(), (0, 0.52), strict=False):
        below.text(left, 1, f"step {step:,}", fontsize=9, fontweight="bold", va="top")
        below.text(left, 1 - 0.25 / rows[1], text, fontsize=9, family="monospace", va="top", parse_math=False)
    return figure


def _excerpts(samples: list[Sample]) -> str:
    """Returns the first lines of the samples of the first two prompts."""
    prompts: dict[str, str] = {}
    for sample in samples:
        prompts.setdefault(sample.prompt, sample.text)
    texts = [redact(prompt + text).expandtabs(4) for prompt, text in list(prompts.items())[:2]]
    return f"\n{'─' * _SAMPLE_COLUMNS}\n".join(map(_first_lines, texts))


def _first_lines(text: str) -> str:
    """Returns wrapped lines that fit below a plot, with a mark for what cannot be printed."""
    wrapped = [textwrap.wrap(line, _SAMPLE_COLUMNS, replace_whitespace=False) or [""] for line in text.splitlines()]
    lines = [line for part in wrapped for line in part][:_SAMPLE_LINES]
    return "\n".join("".join(char if char.isprintable() else "\ufffd" for char in line) for line in lines).strip("\n")


def _finite_losses(records: list[Record]) -> list[float]:
    curves = [record.curves.get(name, Curve()) for record in records for name in ("loss", "val_loss")]
    return [value for curve in curves for value in curve.values if math.isfinite(value)]


def _plot_loss(records: list[Record]) -> Any:
    """Plots training and validation loss over steps, tokens and time; None without losses."""
    if not _finite_losses(records):
        return None
    data = [one for record in records for one in (record.environment.data if record.environment else [None])]
    on_fineweb = all(one and "fineweb-edu" in one.source.lower() and one.tokenizer == "gpt2" for one in data)
    axes = {name: axis for name, axis in _AXES.items() if any(axis(record, [0]) is not None for record in records)}
    figure, panels = _figure("Loss", records, len(axes), width=5.2 * max(len(axes), 1.4), height=4.6, sharey=True)
    for panel, name in zip(panels, axes, strict=True):
        _plot_losses(panel, name, records)
        for model in models_beside(records) if on_fineweb else []:
            _plot_reference(panel, model, model.fineweb_edu_loss)
    _finish_losses(panels[0], records)
    return figure


def _plot_losses(panel: Any, name: str, records: list[Record]) -> None:
    axis, unit = _AXES[name], _label_axis(panel, name, records)
    for record, color in zip(records, cycle(COLORS), strict=False):
        train, val = record.curves.get("loss", Curve()), record.curves.get("val_loss", Curve())
        if (x := axis(record, train.steps)) is not None and len(x):
            panel.plot(x / unit, train.values, color=color, linewidth=0.6, alpha=0.25)
            panel.plot(x / unit, _smoothed(train.values), color=color, linewidth=1.2, alpha=0.6,
                       label=f"{record.name}, training (smoothed)")  # fmt: skip
        if (x := axis(record, val.steps)) is not None and len(x):
            panel.plot(x / unit, val.values, color=color, linewidth=1.6, marker="o", markersize=4,
                       markeredgecolor="white", markeredgewidth=0.5,
                       label=f"{record.name}, validation: {val.values[-1]:.3f}")  # fmt: skip


def _finish_losses(panel: Any, records: list[Record]) -> None:
    """Sets the range of a panel of losses, without the first ones of the training, and its legend."""
    losses = _finite_losses(records)
    low, high = min(losses), float(np.percentile(losses, 98))
    panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panel.set_ylabel("loss (nats per token)")
    panel.legend(loc="upper right", fontsize=8, framealpha=0.9)


def _plot_reference(panel: Any, model: ReferenceResult, value: float | None) -> None:
    if value is not None:
        color, label = _REFERENCE_COLORS[model.name.split()[0]], f"{model.name}: {value:.4f}"
        panel.axhline(value, color=color, linestyle="--", linewidth=1, label=label)


def _plot_hellaswag(records: list[Record]) -> Any:
    """Plots HellaSwag over tokens (over steps if a run did not log tokens) with GPT-2 and GPT-3 of the same size."""
    metrics = {rule: f"hellaswag/{rule}/acc_norm" for rule in ("completion", "lm_eval")}
    rules = [rule for rule, metric in metrics.items() if any(metric in record.curves for record in records)]
    if not rules:
        return None
    figure, panels = _figure("HellaSwag", records, len(rules), width=6.4 * len(rules), height=4.4)
    name = "tokens" if all(record.tokens() for record in records) else "step"
    for panel, rule in zip(panels, rules, strict=True):
        unit = _label_axis(panel, name, records)
        for record, color in zip(records, cycle(COLORS), strict=False):
            if curve := record.curves.get(metrics[rule]):
                x: Any = _AXES[name](record, curve.steps)
                panel.plot(x / unit, curve.values, color=color, linewidth=1.6, marker="o", markersize=4,
                           label=f"{record.name}: {curve.values[-1]:.4f}")  # fmt: skip
        for model in models_beside(records):
            _plot_reference(panel, model, getattr(model, f"hellaswag_{rule}"))
        panel.axhline(0.25, color="black", linestyle=":", linewidth=1, label="chance: 0.25")
        panel.set(ylabel="accuracy (acc_norm)", title=f"{rule} rule")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, 0.22), max(high, 0.32))  # shows noise around chance as small
        panel.legend(fontsize=8, framealpha=0.9)
    return figure


def _plot_training(records: list[Record]) -> Any:
    """Plots learning rate, gradient norm, throughput and MFU over steps; None without any of them."""
    titles = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "tokens_per_second": "tokens per second",
        "mfu": "model FLOPs utilisation",
    }
    metrics = [metric for metric in titles if any(metric in record.curves for record in records)]
    if not metrics:
        return None
    figure, panels = _figure("Training", records, len(metrics), width=4.2 * max(len(metrics), 1.6), height=3.6)
    for panel, metric in zip(panels, metrics, strict=True):
        _label_axis(panel, "step", records)
        for record, color in zip(records, cycle(COLORS), strict=False):
            if curve := record.curves.get(metric):
                values: Any = curve.values
                if metric != "learning_rate":
                    panel.plot(curve.steps, values, color=color, linewidth=0.6, alpha=0.3)
                    values = _smoothed(values)
                panel.plot(curve.steps, values, color=color, linewidth=1.3, label=record.name)
        panel.set_title(titles[metric], fontsize=10)
        if metric == "grad_norm":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        elif metric == "tokens_per_second":
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter(_engineering_format())
        elif metric == "mfu":
            panel.set_ylim(0, 1)
            panel.yaxis.set_major_formatter("{x:.0%}")
    if len(records) > 1:
        panels[0].legend(fontsize=8)
    return figure


def _figure(title: str, records: list[Record], columns: int, **layout: Any) -> tuple[Any, list[Any]]:
    figure, panels = new_figure(columns, **layout)
    parameters = _parameters(records[0])
    size = f" ({parameters / 1e6:,.1f}M parameters)" if parameters else ""
    runs = f"{len(records)} runs" if len(records) > 1 else f"{records[0].name}{size}"
    figure.suptitle(f"{title} of {runs}", fontweight="bold")
    return figure, panels


def new_figure(
    columns: int, width: float, height: float, sharey: bool = False, rows: Sequence[float] = (1,)
) -> tuple[Any, list[Any]]:
    """Returns a matplotlib figure of `width` x `height` inches, and its panels by row; `rows` are relative heights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(len(rows), columns, squeeze=False, sharey=sharey, height_ratios=rows).flat)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _interpolate(curve: Curve | None, steps: Sequence[int]) -> np.ndarray | None:
    return None if curve is None else np.interp(steps, curve.steps, curve.values)


def _label_axis(panel: Any, name: str, records: list[Record]) -> float:
    """Labels the x axis, and returns the unit to divide its values by."""
    if name != "time":
        panel.set_xlabel(name)
        panel.xaxis.set_major_formatter(_engineering_format())
        return 1.0
    longest = max(seconds.values[-1] for record in records if (seconds := record.seconds()) is not None)
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    label, unit = next((label, unit) for label, unit in units.items() if longest >= 2 * unit or unit == 1)
    panel.set_xlabel(f"training time ({label})")
    return float(unit)


def _engineering_format() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Returns the moving average over a fiftieth of the run."""
    window = np.ones(2 * (len(values) // 100) + 1)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def models_beside(records: list[Record]) -> list[ReferenceResult]:
    """Returns the published models of the sizes of the runs."""
    return list(dict.fromkeys(model for record in records for model in of_the_same_size(_parameters(record))))


def _parameters(record: Record) -> int | None:
    return record.environment.parameters if record.environment else None

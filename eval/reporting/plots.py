"""Plots of runs: overview, loss, HellaSwag, and training curves."""

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import redact
from eval.reporting.records import Curve, Record, ReferenceResult, Sample, of_the_same_size

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
_REFERENCE_COLORS = {"GPT-2": "#555555", "GPT-3": "#999999", "build-nanogpt": "#b8860b"}
_AXES: dict[str, Callable[[Record], Curve | None]] = {
    "step": lambda record: Curve([0, 1 << 53], [0, 1 << 53]),
    "tokens": Record.tokens,
    "minutes of training": lambda record: _minutes(record.seconds()),
}
_TRAINING = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens per second",
    "mfu": "model FLOPs utilisation",
}
_SAMPLE_LINES, _SAMPLE_COLUMNS = 7, 31  # of two samples side by side, legible on a phone


def plot_all(records: list[Record], folder: Path) -> list[Path]:
    """Saves every plot that the records have data for to `folder`; returns their paths."""
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
    """Saves a matplotlib figure atomically."""
    temporary = path.with_name(f".{path.stem}.partial.png")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # a sample's letter that matplotlib's font lacks
        figure.savefig(temporary, dpi=130)
    temporary.rename(path)


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


def models_beside(records: list[Record]) -> list[ReferenceResult]:
    """Returns the published models of the same sizes as the runs."""
    return list(dict.fromkeys(model for record in records for model in of_the_same_size(record.parameters)))


def _plot_overview(record: Record) -> Any:
    """Plots losses over steps, above samples of the first and of the last step that has some; None without both."""
    if not record.samples or not _finite_losses([record]):
        return None
    steps = dict.fromkeys([record.samples[0].step, record.samples[-1].step])
    columns = {step: _excerpts([sample for sample in record.samples if sample.step == step]) for step in steps}
    rows = (2.8, 0.17 * (2 + max(text.count("\n") + 1 for text in columns.values())))
    figure, (losses, below) = _figure("Overview", [record], 1, width=6, height=sum(rows), rows=rows)
    _plot_losses(losses, [record], "step")
    below.set_axis_off()
    for (step, text), left in zip(columns.items(), (0, 0.52), strict=False):
        below.text(left, 1, f"step {step:,}", fontsize=9, fontweight="bold", va="top")
        below.text(left, 1 - 0.25 / rows[1], text, fontsize=9, family="monospace", va="top", parse_math=False)
    return figure


def _excerpts(samples: list[Sample]) -> str:
    """Returns the first lines, wrapped, of samples for the first two prompts; unprintable characters are replaced."""
    prompts: dict[str, str] = {}
    for sample in samples:
        prompts.setdefault(sample.prompt, sample.text)
    texts = []
    for prompt, text in list(prompts.items())[:2]:
        lines = redact(prompt + text).expandtabs(4).splitlines()
        wrapped = (textwrap.wrap(line, _SAMPLE_COLUMNS, replace_whitespace=False) or [""] for line in lines)
        shown = "\n".join([*chain.from_iterable(wrapped)][:_SAMPLE_LINES]).strip("\n")
        texts.append("".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in shown))
    return f"\n{'─' * _SAMPLE_COLUMNS}\n".join(texts)


def _plot_loss(records: list[Record]) -> Any:
    """Plots training and validation loss over steps, tokens and time; None without losses."""
    if not _finite_losses(records):
        return None
    data = [one for record in records for one in (record.environment.data if record.environment else [None])]
    on_fineweb = all(one and "fineweb-edu" in one.source.lower() and one.tokenizer == "gpt2" for one in data)
    axes = [name for name, axis in _AXES.items() if any(map(axis, records))]
    figure, panels = _figure("Loss", records, len(axes), width=5.2 * max(len(axes), 1.4), height=4.6, sharey=True)
    for panel, axis in zip(panels, axes, strict=True):
        for model in models_beside(records) if on_fineweb else []:
            _plot_reference(panel, model, model.fineweb_edu_loss)
        _plot_losses(panel, records, axis)
    return figure


def _plot_losses(panel: Any, records: list[Record], axis: str) -> None:
    """Plots losses, scaled so that the first steps do not dominate the axis."""
    _plot_metric(panel, records, axis, "loss", lambda name, _: f"{name}, training (smoothed)", smooth=True)
    _plot_metric(panel, records, axis, "val_loss", lambda name, last: f"{name}, validation: {last:.3f}")
    losses = _finite_losses(records)
    low, high = min(losses), float(np.percentile(losses, 98))
    panel.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panel.set_ylabel("loss (nats per token)")
    panel.legend(loc="upper right", fontsize=8, framealpha=0.9)


def _finite_losses(records: list[Record]) -> list[float]:
    curves = [record.curves.get(name, Curve()) for record in records for name in ("loss", "val_loss")]
    return [value for curve in curves for value in curve.values if math.isfinite(value)]


def _plot_hellaswag(records: list[Record]) -> Any:
    """Plots HellaSwag over tokens (over steps if a run did not log tokens) with GPT-2 and GPT-3 of the same size."""
    metrics = {rule: f"hellaswag/{rule}/acc_norm" for rule in ("completion", "lm_eval")}
    rules = [rule for rule, metric in metrics.items() if any(metric in record.curves for record in records)]
    if not rules:
        return None
    figure, panels = _figure("HellaSwag", records, len(rules), width=6.4 * len(rules), height=4.4)
    axis = "tokens" if all(record.tokens() for record in records) else "step"
    for panel, rule in zip(panels, rules, strict=True):
        _plot_metric(panel, records, axis, metrics[rule], lambda name, last: f"{name}: {last:.4f}")
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
    metrics = [metric for metric in _TRAINING if any(metric in record.curves for record in records)]
    if not metrics:
        return None
    figure, panels = _figure("Training", records, len(metrics), width=4.2 * max(len(metrics), 1.6), height=3.6)
    for panel, metric in zip(panels, metrics, strict=True):
        _plot_metric(panel, records, "step", metric, lambda name, _: name, smooth=True)
        panel.set_title(_TRAINING[metric], fontsize=10)
        if metric == "grad_norm":
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    if len(records) > 1:
        panels[0].legend(fontsize=8)
    return figure


def _figure(title: str, records: list[Record], columns: int, **layout: Any) -> tuple[Any, list[Any]]:
    figure, panels = new_figure(columns, **layout)
    size = f" ({records[0].parameters / 1e6:,.1f}M parameters)" if records[0].parameters else ""
    runs = f"{len(records)} runs" if len(records) > 1 else f"{records[0].name}{size}"
    figure.suptitle(f"{title} of {runs}", fontweight="bold")
    return figure, panels


def _plot_metric(
    panel: Any, records: list[Record], axis: str, metric: str, label: Callable[[str, float], str], smooth: bool = False
) -> None:
    """Plots a metric of each run over an axis, as points or as a moving average over a fiftieth of the run.

    Args:
        label: called with the name of the run and the last value.
    """
    from matplotlib.ticker import EngFormatter

    for record, color in zip(records, cycle(COLORS), strict=False):
        curve, position = record.curves.get(metric), _AXES[axis](record)
        if curve is None or position is None:
            continue
        x, style = position.at(curve.steps), {"color": color, "label": label(record.name, curve.values[-1])}
        if smooth:
            window = np.ones(2 * (len(x) // 100) + 1)
            mean = np.convolve(curve.values, window, mode="same") / np.convolve(np.ones(len(x)), window, mode="same")
            panel.plot(x, curve.values, color=color, linewidth=0.6, alpha=0.25)
            panel.plot(x, mean, linewidth=1.2, alpha=0.6, **style)
        else:
            panel.plot(x, curve.values, linewidth=1.6, marker="o", markersize=4, markeredgecolor="white", **style)
    panel.set_xlabel(axis)
    if axis in ("step", "tokens"):
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _minutes(seconds: Curve | None) -> Curve | None:
    return seconds and Curve(seconds.steps, [value / 60 for value in seconds.values])


def _plot_reference(panel: Any, model: ReferenceResult, value: float | None) -> None:
    if value is not None:
        color, label = _REFERENCE_COLORS[model.name.split()[0]], f"{model.name}: {value:.4f}"
        panel.axhline(value, color=color, linestyle="--", linewidth=1, label=label)

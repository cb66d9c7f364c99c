"""Pictures of runs: losses, HellaSwag, and how the training went."""

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from eval.reporting.reference_results import Published, of_the_same_size
from eval.reporting.run_records import Curve, Record

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf")
_REFERENCES = {"GPT-2": "#555555", "GPT-3": "#999999"}
Axis = Callable[[Record, Sequence[int]], np.ndarray | None]


def plot_all(records: list[Record], folder: Path) -> list[Path]:
    """Draw what the records hold into `folder`: the paths of the pictures."""
    pictures = {"loss.png": _losses(records), "hellaswag.png": _hellaswag(records), "training.png": _training(records)}
    paths = []
    for name, figure in pictures.items():
        if figure is not None:
            path = folder / name
            temporary = path.with_name(f".{path.stem}.partial.png")
            figure.savefig(temporary, dpi=130)
            temporary.rename(path)
            paths.append(path)
    return paths


def _losses(records: list[Record]) -> Any:
    """Training and validation loss against steps, tokens and time; None for logs of neither."""
    every = [
        v
        for r in records
        for name in ("loss", "val_loss")
        if name in r.curves
        for v in r.curves[name].values
        if math.isfinite(v)
    ]
    if not every:
        return None
    axes_of = {"step": _steps, "tokens": _tokens, "time": _time}
    shown = {name: axis for name, axis in axes_of.items() if any(axis(r, [0]) is not None for r in records)}
    figure, panels = _figure(1, len(shown), width=5.2 * max(len(shown), 1.4), height=4.6, sharey=True)
    for panel, (name, axis) in zip(panels, shown.items(), strict=True):
        unit = _set_axis(panel, name, records)
        for record, color in zip(records, cycle(_COLORS), strict=False):
            loss, val = record.curves.get("loss", Curve()), record.curves.get("val_loss", Curve())
            if (x := axis(record, loss.steps)) is not None and len(x):
                panel.plot(x / unit, loss.values, color=color, linewidth=0.6, alpha=0.25)
                panel.plot(x / unit, _smoothed(loss.values), color=color, linewidth=1.2, alpha=0.6,
                           label=f"{record.name}, training (smoothed)")  # fmt: skip
            if (x := axis(record, val.steps)) is not None and len(x):
                panel.plot(x / unit, val.values, color=color, linewidth=1.6, marker="o", markersize=4,
                           markeredgecolor="white", markeredgewidth=0.5,
                           label=f"{record.name}, validation: {val.values[-1]:.3f}")  # fmt: skip
    for reference in _fineweb_references(records):
        for panel in panels:
            panel.axhline(reference.fineweb_edu_loss, color=_REFERENCES["GPT-2"], linestyle="--", linewidth=1,
                          label=f"{reference.name}: {reference.fineweb_edu_loss:.4f}")  # fmt: skip
    low, high = min(every), float(np.percentile(every, 98))
    panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend(loc="upper right", fontsize=8, framealpha=0.9)
    figure.suptitle(_title("Loss", records), fontweight="bold")
    return figure


def _fineweb_references(records: list[Record]) -> list[Any]:
    """GPT-2's loss, where all runs are validated on the data that it was measured on, in its tokens."""
    data = [one for record in records for one in (record.environment.data if record.environment else [None])]
    if not all(one and "fineweb-edu" in one.source.lower() and one.tokenizer == "gpt2" for one in data):
        return []
    return [p for p in models_beside(records) if p.fineweb_edu_loss is not None]


def _hellaswag(records: list[Record]) -> Any:
    """HellaSwag against tokens (steps, where a log does not say), with GPT-2 and GPT-3 of the same size."""
    rules = {"completion": "hellaswag_completion", "lm_eval": "hellaswag_lm_eval"}
    shown = [rule for rule in rules if any(f"hellaswag/{rule}/acc_norm" in r.curves for r in records)]
    if not shown:
        return None
    figure, panels = _figure(1, len(shown), width=6.4 * len(shown), height=4.4, sharey=False)
    axis, name = (_tokens, "tokens") if all(r.tokens() for r in records) else (_steps, "step")
    for panel, rule in zip(panels, shown, strict=True):
        unit = _set_axis(panel, name, records)
        for record, color in zip(records, cycle(_COLORS), strict=False):
            if curve := record.curves.get(f"hellaswag/{rule}/acc_norm"):
                panel.plot(axis(record, curve.steps) / unit, curve.values, color=color, linewidth=1.6, marker="o",
                           markersize=4, label=f"{record.name}: {curve.values[-1]:.4f}")  # fmt: skip
        for model in models_beside(records):
            if (score := getattr(model, rules[rule])) is not None:
                color = _REFERENCES[model.name.split()[0]]
                panel.axhline(score, color=color, linestyle="--", linewidth=1, label=f"{model.name}: {score:.4f}")
        panel.axhline(0.25, color="black", linestyle=":", linewidth=1, label="chance: 0.25")
        panel.set(ylabel="accuracy (acc_norm)", title=f"{rule} rule")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, 0.22), max(high, 0.32))  # so that what is chance looks like it
        panel.legend(fontsize=8, framealpha=0.9)
    figure.suptitle(_title("HellaSwag", records), fontweight="bold")
    return figure


def _training(records: list[Record]) -> Any:
    """Learning rate, gradient norm, throughput and MFU against the step; None for a log of none of these."""
    titles = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "tokens_per_second": "tokens per second",
        "mfu": "model FLOPs utilisation",
    }
    shown = [metric for metric in titles if any(metric in r.curves for r in records)]
    if not shown:
        return None
    figure, panels = _figure(1, len(shown), width=4.2 * max(len(shown), 1.6), height=3.6, sharey=False)
    for panel, metric in zip(panels, shown, strict=True):
        _set_axis(panel, "step", records)
        for record, color in zip(records, cycle(_COLORS), strict=False):
            if curve := record.curves.get(metric):
                noisy = metric != "learning_rate"
                if noisy:
                    panel.plot(curve.steps, curve.values, color=color, linewidth=0.6, alpha=0.3)
                values = _smoothed(curve.values) if noisy else curve.values
                panel.plot(curve.steps, values, color=color, linewidth=1.3, label=record.name)
        panel.set_title(titles[metric], fontsize=10)
        if metric == "grad_norm":
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        elif metric == "tokens_per_second":
            panel.set_ylim(bottom=0)
            panel.yaxis.set_major_formatter(_thousands())
        elif metric == "mfu":
            panel.set_ylim(0, 1)
            panel.yaxis.set_major_formatter("{x:.0%}")
    if len(records) > 1:
        panels[0].legend(fontsize=8)
    figure.suptitle(_title("Training", records), fontweight="bold")
    return figure


def _figure(rows: int, columns: int, width: float, height: float, sharey: bool) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _steps(record: Record, steps: Sequence[int]) -> np.ndarray:
    return np.asarray(steps, dtype=float)


def _tokens(record: Record, steps: Sequence[int]) -> np.ndarray | None:
    return _along(record.tokens(), steps)


def _time(record: Record, steps: Sequence[int]) -> np.ndarray | None:
    return _along(record.seconds(), steps)


def _along(curve: Curve | None, steps: Sequence[int]) -> np.ndarray | None:
    return None if curve is None else np.interp(steps, curve.steps, curve.values)


def _set_axis(panel: Any, name: str, records: list[Record]) -> float:
    """Label the x axis; what its values are to be divided by."""
    if name != "time":
        panel.set_xlabel(name)
        panel.xaxis.set_major_formatter(_thousands())
        return 1.0
    longest = max(r.seconds().values[-1] for r in records if r.seconds() is not None)
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    label, unit = next((label, unit) for label, unit in units.items() if longest >= 2 * unit or unit == 1)
    panel.set_xlabel(f"training time ({label})")
    return float(unit)


def _thousands() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """The mean over a fiftieth of the run around each value."""
    window = np.ones(2 * (len(values) // 100) + 1)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")


def models_beside(records: list[Record]) -> list[Published]:
    """The published models of the sizes of the runs."""
    models = [model for record in records for model in of_the_same_size(_parameters(record))]
    return list(dict.fromkeys(models))


def _parameters(record: Record) -> int | None:
    return record.environment.parameters if record.environment else None


def _title(what: str, records: list[Record]) -> str:
    if len(records) > 1:
        return f"{what} of {len(records)} runs"
    parameters = _parameters(records[0])
    return f"{what} of {records[0].name}" + (f" ({parameters / 1e6:,.1f}M parameters)" if parameters else "")

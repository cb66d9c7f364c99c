"""Report on a run, or on several compared: plots, report.html and report.md.

python -m eval.report runs/quickstart
python -m eval.report runs/quickstart runs/other path/to/build-nanogpt/log/log.txt
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from data_prep.common.command_line import ArgumentParser, UserError, redact, run
from data_prep.common.files import partial_name, read_text, write_text
from eval.loss import perplexity
from eval.reporting import sections
from eval.reporting.plots import models_beside, plot_all
from eval.reporting.records import Record, read_run
from eval.reporting.sections import duration, number, section, table, write_page

FILE_NAME, PAGE_NAME = "report.md", "report.html"
_SENTINEL = "<!-- written by python -m eval.report -->"


def write_report(records: list[Record], folder: Path) -> Path:
    """Writes `report.md`, its plots, and the same as one page, `report.html`, to `folder`; returns the path of
    `report.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plot_all(records, folder)
    parts = [
        f"# {' and '.join(record.name for record in records)}",
        section("Results", _results(records)),
        sections.pictures(pictures),
        section("lm-evaluation-harness", _harness(records)),
    ]
    parts += map(sections.samples, records)
    parts.append(section("Settings" if len(records) == 1 else "Settings that differ", sections.settings(records)))
    for record in records:
        parts.append(section(f"Data of {record.name}", sections.data(record)))
        parts.append(section(f"Environment of {record.name}", sections.environment(record)))
    text = redact("\n\n".join(filter(None, parts))) + "\n"
    path = folder / FILE_NAME
    write_text(path, f"{_SENTINEL}\n{text}")
    write_page(folder / PAGE_NAME, text, pictures, _SENTINEL)
    return path


def check_output(folder: Path) -> None:
    """Raises `UserError` if a report in a folder chosen by the user would overwrite somebody else's file."""
    for name in (FILE_NAME, PAGE_NAME, *sections.CAPTIONS):
        # Pictures have no sentinel: they are ours where a report.md with one is.
        marked = folder / (name if name in (FILE_NAME, PAGE_NAME) else FILE_NAME)
        ours = marked.exists() and read_text(marked, "replace").startswith(_SENTINEL)
        if os.path.lexists(folder / name) and not ours:
            raise UserError(f"{folder / name} exists and does not belong to a report of ours; choose another --output")


def remove_report(folder: Path) -> None:
    """Removes the files of `write_report` from a folder, and the folder if it is then empty."""
    for name in (FILE_NAME, partial_name(FILE_NAME), PAGE_NAME, partial_name(PAGE_NAME), *sections.CAPTIONS):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not there, or not empty
        folder.rmdir()


def _harness(records: list[Record]) -> str:
    """Returns the table of harness scores, next to GPT-3's published scores on the same metrics."""
    published = [model for model in models_beside(records) if model.harness]
    rows = []
    for record in records:
        for checkpoint, results in record.harness.items():
            for task, scores in results.items():
                # A metric may have a filter in its name, as in "exact_match,remove_whitespace".
                beside = [
                    {name: score for name in scores if (score := model.harness.get((task, name.partition(",")[0])))}
                    for model in published
                ]
                columns = [", ".join(f"{name} {n:.4f}" for name, n in some.items()) for some in (scores, *beside)]
                if scores:  # none of a group
                    rows.append([record.name, checkpoint, task, *columns])
    if not rows:
        return ""
    text = table(["run", "checkpoint", "task", "scores", *(model.name for model in published)], rows)
    note = "GPT-3's scores are those of its paper (table H.1, zero-shot), with prompts of its own."
    return f"{text}\n\n{note}" if published else text


def _results(records: list[Record]) -> str:
    """Returns the table of all runs and of the published models of the same size."""
    heading = ["", "parameters", "tokens", "validation loss", "perplexity", "bits per byte", "HellaSwag, completion",
               "HellaSwag, lm_eval", "training time", "tokens/s"]  # fmt: skip
    rows = [_result(record) for record in records]
    notes = ["HellaSwag is acc_norm. Time and speed are those of training alone."]
    for record in records:
        if (limit := record.settings.get("hellaswag_limit")) and record.settings.get("hellaswag_every"):
            notes.append(f"HellaSwag of {record.name} is of its first {limit} items.")
    for model in (published := models_beside(records)):
        loss = f"{model.fineweb_edu_loss:.4f} (FineWeb-Edu)" if model.fineweb_edu_loss else ""
        scores = [number(model.hellaswag_completion, ".4f"), number(model.hellaswag_lm_eval, ".4f")]
        rows.append([model.name, number(model.parameters, ",.0f"), "", loss, "", "", *scores, "", ""])
    if not published:
        notes.append("No GPT-2 or GPT-3 of this size was published.")
    return f"{table(heading, rows)}\n\n{' '.join(notes)}"


def _result(record: Record) -> list[str]:
    loss, speed = record.last("val_loss"), record.curves.get("tokens_per_second")
    tokens, seconds = record.tokens(), record.seconds()
    return [
        f"**{record.name}**",
        number(record.parameters, ",.0f"),
        number(tokens.values[-1] if tokens else None, ",.0f"),
        _with_best(record, "val_loss", min),
        number(perplexity(loss) if loss is not None else None, ",.2f"),
        _with_best(record, "val_bits_per_byte", min),
        _with_best(record, "hellaswag/completion/acc_norm", max),
        _with_best(record, "hellaswag/lm_eval/acc_norm", max),
        duration(seconds.values[-1]) if seconds else "",
        number(sorted(speed.values)[len(speed.values) // 2] if speed else None, ",.0f"),
    ]


def _with_best(record: Record, metric: str, choose: Callable[[list[float]], float]) -> str:
    """Formats the last value of a metric, followed by the best one and its step if that differs."""
    if (curve := record.curves.get(metric)) is None:
        return ""
    last, best = curve.values[-1], choose(curve.values)
    text = f"{last:.4f}"
    if best != last:
        text += f" ({choose.__name__} {best:.4f} at step {curve.steps[curve.values.index(best)]})"
    return text


def main() -> None:
    parser = ArgumentParser("python -m eval.report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a log.txt or main.log")
    parser.add_option("output", type=Path, help="folder; by default RUN/report for one run folder, else report")
    parser.add_option("batch_tokens", type=int, help="tokens per step of other trainers' logs")
    args = parser.parse_args()
    if args.batch_tokens is not None and args.batch_tokens < 1:
        raise UserError(f"batch_tokens={args.batch_tokens} must be at least 1")
    records = [read_run(path, args.batch_tokens) for path in args.runs]
    folder = args.runs[0] / "report"
    if args.output or len(args.runs) > 1 or not args.runs[0].is_dir():
        folder = args.output or Path("report")
        check_output(folder)
    print(write_report(records, folder).with_name(PAGE_NAME))


if __name__ == "__main__":
    run(main)

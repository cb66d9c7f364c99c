"""Plots and report.md of a run, or of several compared.

python -m eval.report runs/quickstart
python -m eval.report runs/quickstart runs/other path/to/build-nanogpt/log/log.txt
"""

import contextlib
import os
from pathlib import Path

from data_prep.common.command_line import ArgumentParser, UserError, redact, run
from data_prep.common.files import partial_name, read_text, write_text
from eval.common.scores import language_modeling_scores
from eval.reporting import sections
from eval.reporting.plots import models_beside, plot_all
from eval.reporting.reference_results import Published
from eval.reporting.run_records import Record, read_run
from eval.reporting.sections import duration, number, section, table

FILE_NAME = "report.md"
_MARK = "<!-- written by python -m eval.report -->"


def write_report(records: list[Record], folder: Path) -> Path:
    """Write `report.md` and its pictures into `folder`; the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plot_all(records, folder)
    parts = [
        f"{_MARK}\n# {' and '.join(record.name for record in records)}",
        _results(records),
        sections.pictures(pictures),
        section("lm-evaluation-harness", _harness(records)),
        section("Settings" if len(records) == 1 else "Settings that differ", sections.settings(records)),
    ]
    for record in records:
        parts.append(section(f"Data of {record.name}", sections.data(record)))
        if samples := sections.last_samples(record):
            parts.append(section(f"Samples of {record.name} at step {samples[0].step}", sections.samples(record)))
        parts.append(section(f"Environment of {record.name}", sections.environment(record)))
    path = folder / FILE_NAME
    write_text(path, redact("\n\n".join(filter(None, parts))) + "\n")
    return path


def check_place(folder: Path) -> None:
    """Check that a report can be written into a folder that the user names (`UserError` where it would take a file)."""
    there = [folder / name for name in (FILE_NAME, *sections.CAPTIONS) if os.path.lexists(folder / name)]
    if there and not (there[0].name == FILE_NAME and read_text(there[0]).startswith(_MARK)):
        raise UserError(f"{there[0]} is there already, and not of a report of ours; choose another --output")


def remove_report(folder: Path) -> None:
    """Remove what `write_report` has written into a folder, by its names, and the folder if nothing else is in it."""
    for name in (FILE_NAME, partial_name(FILE_NAME), *sections.CAPTIONS):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or has files of others in it
        folder.rmdir()


def _harness(records: list[Record]) -> str:
    rows = [
        [record.name, checkpoint, task, ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())]
        for record in records
        for checkpoint, results in record.harness.items()
        for task, scores in results.items()
    ]
    return table(["run", "checkpoint", "task", "scores"], rows) if rows else ""


def _results(records: list[Record]) -> str:
    """The table of all runs, and of the published models of their sizes."""
    published = models_beside(records)
    heading = ["", "parameters", "tokens", "validation loss", "perplexity", "bits per byte", "HellaSwag, completion",
               "HellaSwag, lm_eval", "training time", "tokens/s"]  # fmt: skip
    rows = [_result(record) for record in records] + [_published(model) for model in published]
    notes = ["HellaSwag is acc_norm. Time and speed are those of training alone."]
    notes += [
        f"HellaSwag of {record.name} is of its first {record.settings['hellaswag_limit']:,} items."
        for record in records
        if record.settings.get("hellaswag_limit") and record.settings.get("hellaswag_every")
    ]
    if not published:
        notes.append("No GPT-2 or GPT-3 of this size was published.")
    return f"## Results\n\n{table(heading, rows)}\n\n{' '.join(notes)}"


def _result(record: Record) -> list[str]:
    loss, speed, seconds = record.last("val_loss"), record.curves.get("tokens_per_second"), record.seconds()
    tokens = record.tokens()
    perplexity = language_modeling_scores(loss, 1, 0)["perplexity"] if loss is not None else None
    return [
        f"**{record.name}**",
        number(record.environment.parameters if record.environment else None, ",.0f"),
        number(tokens.values[-1] if tokens else None, ",.0f"),
        number(loss, ".4f"),
        number(perplexity, ",.2f"),
        number(record.last("val_bits_per_byte"), ".4f"),
        number(record.last("hellaswag/completion/acc_norm"), ".4f"),
        number(record.last("hellaswag/lm_eval/acc_norm"), ".4f"),
        duration(seconds.values[-1]) if seconds else "",
        number(sorted(speed.values)[len(speed.values) // 2] if speed else None, ",.0f"),
    ]


def _published(model: Published) -> list[str]:
    loss = f"{model.fineweb_edu_loss:.4f} (FineWeb-Edu)" if model.fineweb_edu_loss else ""
    scores = [number(model.hellaswag_completion, ".4f"), number(model.hellaswag_lm_eval, ".4f")]
    return [model.name, number(model.parameters, ",.0f"), "", loss, "", "", *scores, "", ""]


def main() -> None:
    parser = ArgumentParser("python -m eval.report", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a log.txt or main.log")
    parser.add_option("output", type=Path, help="folder; RUN/report of a single run folder, else report, if not given")
    parser.add_option("batch_tokens", type=int, help="tokens of a step, for logs that do not say")
    args = parser.parse_args()
    if args.batch_tokens is not None and args.batch_tokens < 1:
        raise UserError(f"batch_tokens={args.batch_tokens} must be at least 1")
    alone = len(args.runs) == 1 and args.runs[0].is_dir()
    records = [read_run(path, args.batch_tokens) for path in args.runs]
    folder = args.runs[0] / "report"
    if args.output or not alone:
        folder = args.output or Path("report")
        check_place(folder)
    print(write_report(records, folder))


if __name__ == "__main__":
    run(main)

"""Plots and report.md of a run, or of several compared.

python -m eval.report runs/quickstart
python -m eval.report runs/quickstart runs/other path/to/build-nanogpt/log/log.txt
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep import contamination
from data_prep.cli import ArgumentParser, UserError, run
from eval.logs import Record, read_run
from eval.loss import language_modeling_scores
from eval.plots import models_beside, plot_all
from eval.published import Published

_CAPTIONS = {
    "loss.png": "Training and validation loss",
    "hellaswag.png": "HellaSwag",
    "training.png": "Learning rate, gradient norm and speed",
}
_SAMPLES = 3


def write_report(records: list[Record], folder: Path) -> Path:
    """Write `report.md` and its pictures into `folder`; the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plot_all(records, folder)
    sections = [
        f"# {' and '.join(record.name for record in records)}",
        _results(records),
        "\n\n".join(f"![{_CAPTIONS[picture.name]}]({picture.name})" for picture in pictures),
        _harness(records),
        _settings(records),
        *(section for record in records for section in (_data(record), _samples(record), _environment(record))),
    ]
    path = folder / "report.md"
    temporary = path.with_name(".report.md.partial")
    temporary.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    temporary.rename(path)
    return path


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
    return f"## Results\n\n{_table(heading, rows)}\n\n{' '.join(notes)}"


def _result(record: Record) -> list[str]:
    loss, speed, seconds = record.last("val_loss"), record.curves.get("tokens_per_second"), record.seconds()
    tokens = record.tokens()
    perplexity = language_modeling_scores(loss, 1, 0)["perplexity"] if loss is not None else None
    return [
        f"**{record.name}**",
        _number(record.environment.get("parameters"), ",.0f"),
        _number(tokens.values[-1] if tokens else None, ",.0f"),
        _number(loss, ".4f"),
        _number(perplexity, ",.2f"),
        _number(record.last("val_bits_per_byte"), ".4f"),
        _number(record.last("hellaswag/completion/acc_norm"), ".4f"),
        _number(record.last("hellaswag/lm_eval/acc_norm"), ".4f"),
        _duration(seconds.values[-1]) if seconds else "",
        _number(sorted(speed.values)[len(speed.values) // 2] if speed else None, ",.0f"),
    ]


def _published(model: Published) -> list[str]:
    loss = f"{model.fineweb_edu_loss:.4f} (FineWeb-Edu)" if model.fineweb_edu_loss else ""
    scores = [_number(model.hellaswag_completion, ".4f"), _number(model.hellaswag_lm_eval, ".4f")]
    return [model.name, _number(model.parameters, ",.0f"), "", loss, "", "", *scores, "", ""]


def _harness(records: list[Record]) -> str:
    rows = []
    for record in records:
        for checkpoint, results in record.harness.items():
            for task, scores in results.items():
                text = ", ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
                rows.append([record.name, checkpoint, task, text])
    return f"## lm-evaluation-harness\n\n{_table(['run', 'checkpoint', 'task', 'scores'], rows)}" if rows else ""


def _settings(records: list[Record]) -> str:
    """The settings of one run, or those that several differ in."""
    with_settings = [record for record in records if record.settings]
    if not with_settings:
        return ""
    names = dict.fromkeys(name for record in with_settings for name in record.settings)
    if len(with_settings) > 1:
        names = [n for n in names if len({str(record.settings.get(n)) for record in with_settings}) > 1]
        title, rest = "Settings that differ", f"\n\nAll are in `config.yaml` of each run ({len(names)} differ)."
    else:
        title, rest = "Settings", ""
    rows = [[f"`{name}`", *(_cell(record.settings.get(name)) for record in with_settings)] for name in names]
    rows = [row for row in rows if any(row[1:])]
    return f"## {title}\n\n{_table(['', *(record.name for record in with_settings)], rows)}{rest}"


def _data(record: Record) -> str:
    """The data of a run, and what of each evaluation set was found in it."""
    rows, lines = [], []
    for one in record.environment.get("data", []):
        source = " ".join(filter(None, [one["source"], one.get("name")]))
        rows.append(
            [f"`{one['folder']}`", source, one["tokenizer"], f"{one['training_tokens']:,}", f"{one['share']:.1%}"]
        )
        lines += _contamination(Path(one["folder"]))
    if not rows:
        return ""
    table = _table(["folder", "source", "tokenizer", "training tokens", "share"], rows)
    return f"## Data of {record.name}\n\n{table}\n\n" + "\n".join(lines)


def _contamination(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"- Contamination: `{folder}` is not here to ask."]
    found = contamination.recorded(folder)
    if not found:
        return [
            f"- Contamination: `{folder}` has not been searched for evaluation sets "
            f"(`python -m data_prep.contamination {folder} --against FILE ...` does)."
        ]
    return [
        f"- Contamination: of {Path(one['file']).name}, {one['found_items']:,} of {one['items']:,} items "
        f"({one['found_items'] / max(one['items'], 1):.2%}) are in `{folder}`, by {one['found_ngrams']:,} "
        f"{one['ngram']}-grams in {one['documents']:,} documents."
        for one in found
    ]


def _samples(record: Record) -> str:
    if not record.samples:
        return ""
    last = [sample for sample in record.samples if sample["step"] == record.samples[-1]["step"]][:_SAMPLES]
    texts = "\n\n".join("```text\n" + (s["prompt"] + s["text"]).replace("```", "'''") + "\n```" for s in last)
    return f"## Samples of {record.name} at step {last[0]['step']}\n\n{texts}"


def _environment(record: Record) -> str:
    about = record.environment
    if not about:
        return ""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    precision = "float32" if about["mixed_precision"] == "no" else about["mixed_precision"]
    lines = [
        f"{about['num_processes']} x {about['device']}, {precision}, {about['platform']}",
        f"Python {about['python']}, {packages}",
        f"commit {about['git_revision'] or 'unknown'}",
        f"`{' '.join(about['command'])}`",
    ]
    return f"## Environment of {record.name}\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [list(heading), ["---"] * len(heading), *map(list, rows)]
    kept = [i for i in range(len(heading)) if i == 0 or any(row[i] for row in rows[2:])]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in rows)


def _cell(value: Any) -> str:
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:,.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"


def main() -> None:
    parser = ArgumentParser(prog="python -m eval.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or a log.txt or main.log")
    parser.add_option("output", type=Path, help="folder; RUN/report of a single run folder, else report, if not given")
    parser.add_option("batch_tokens", type=int, help="tokens of a step, for logs that do not say")
    args = parser.parse_args()
    if args.batch_tokens is not None and args.batch_tokens < 1:
        raise UserError(f"batch_tokens={args.batch_tokens} must be at least 1")
    alone = len(args.runs) == 1 and args.runs[0].is_dir()
    folder = args.output or (args.runs[0] / "report" if alone else Path("report"))
    print(write_report([read_run(path, args.batch_tokens) for path in args.runs], folder))


if __name__ == "__main__":
    run(main)

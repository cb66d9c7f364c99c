"""Markdown sections of reports and model cards (empty without data), and the HTML page made from them."""

import shlex
from base64 import b64encode
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep import contamination
from data_prep.common.command_line import UserError
from data_prep.common.files import write_text
from data_prep.common.hub import local_folder
from data_prep.sources.source import BUILTIN
from eval.reporting.records import DataRecord, Environment, Record

CAPTIONS = {
    "overview.png": "Losses, and texts of the model",
    "loss.png": "Training and validation loss",
    "hellaswag.png": "HellaSwag",
    "training.png": "Learning rate, gradient norm and speed",
}
_SAMPLES = 3


def section(title: str, text: str) -> str:
    """Returns `text` under a heading; nothing for empty text."""
    return f"## {title}\n\n{text}" if text else ""


def pictures(paths: Iterable[Path]) -> str:
    """Shows plots of `eval.reporting.plots.plot_all` with captions."""
    return "\n\n".join(f"![{CAPTIONS[path.name]}]({path.name})" for path in paths)


def settings(records: list[Record]) -> str:
    """Lists all settings of one run, or those that differ between runs."""
    runs = [record for record in records if record.settings]
    names = list(dict.fromkeys(name for record in runs for name in record.settings))
    if len(runs) > 1:
        names = [name for name in names if len({str(record.settings.get(name)) for record in runs}) > 1]
    rows = [[f"`{name}`", *(_cell(record.settings.get(name)) for record in runs)] for name in names]
    rows = [row for row in rows if any(row[1:])]
    return table(["", *(record.name for record in runs)], rows) if rows else ""


def data(record: Record) -> str:
    """Lists a run's data folders, their cleaning, and their contamination with evaluation sets."""
    rows, lines = [], []
    for one in record.environment.data if record.environment else []:
        amounts = [f"{one.training_tokens:,}", f"{one.share:.1%}"]
        rows.append([f"`{one.folder}`", source(one), one.revision or "", one.tokenizer, *amounts])
        if one.cleaning is not None:
            steps = [
                f"{step.step} kept {step.documents_out / max(step.documents_in, 1):.1%} of documents and "
                f"{step.characters_out / max(step.characters_in, 1):.1%} of characters"
                for step in one.cleaning
            ]
            lines.append(f"- Cleaning of `{one.folder}`: {'; '.join(steps) or 'none by this program'}.")
        lines += [f"- Contamination: {result}" for result in _contamination(one.folder)]
    if not rows:
        return ""
    heading = ["folder", "source", "revision", "tokenizer", "training tokens", "share"]
    return table(heading, rows) + "\n\n" + "\n".join(lines)


def source(one: DataRecord) -> str:
    """Returns the name of a data folder's source."""
    name = "the Python standard library" if one.source == BUILTIN else one.source
    return " ".join(filter(None, [name, one.name]))


def _contamination(folder: str) -> list[str]:
    try:
        path = local_folder(folder, download=False)
        if not path.is_dir():
            return [f"`{folder}` is not here to ask."]
        found = contamination.recorded(path)
    except UserError as error:  # the data has changed since
        return [f"not known ({error})."]
    if not found:
        command = f"python -m data_prep.contamination {shlex.quote(folder)} --against FILE ..."
        return [f"`{folder}` has not been searched for evaluation sets (`{command}` does)."]
    return [
        f"of {Path(one.file).name}, {one.found_items:,} of {one.items:,} items "
        f"({one.found_items / max(one.items, 1):.2%}) are in `{folder}`, by {one.found_ngrams:,} "
        f"{one.ngram}-grams in {one.documents:,} documents."
        for one in found
    ]


def samples(record: Record) -> str:
    """Shows up to three samples from the last sampled step as text blocks under a heading."""
    last = [sample for sample in record.samples if sample.step == record.samples[-1].step][:_SAMPLES]
    texts = [(sample.prompt + sample.text).replace("```", "'''") for sample in last]
    title = f"Samples of {record.name} at step {last[0].step}" if last else ""
    return section(title, "\n\n".join(f"```text\n{text}\n```" for text in texts))


def environment(record: Record) -> str:
    """Lists hardware, versions, revision and command of a run."""
    about = record.environment
    if about is None:
        return ""
    script, *words = about.command or [""]
    packages = ", ".join(f"{name} {version}" for name, version in about.packages.items() if version)
    lines = [
        f"{hardware(about)}, {about.platform}",
        f"Python {about.python}, {packages}",
        f"commit {about.git_revision or 'unknown'}",
        f"`{shlex.join(['/'.join(Path(script).parts[-2:]), *words])}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def hardware(about: Environment) -> str:
    """Returns the devices and precision, as in "8 x NVIDIA H100, bf16"."""
    precision = "float32" if about.mixed_precision == "no" else about.mixed_precision
    return f"{about.num_processes} x {about.device}, {precision}"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table, dropping empty columns; the first column always stays."""
    rows = [list(heading), ["---"] * len(heading), *map(list, rows)]
    kept = [i for i in range(len(heading)) if i == 0 or any(row[i] for row in rows[2:])]
    return "\n".join("| " + " | ".join(row[i] for i in kept) + " |" for row in rows)


def _cell(value: Any) -> str:
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def number(value: float | None, form: str) -> str:
    """Formats `value`; nothing for None."""
    return "" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Formats a duration, as in "2.5 h"."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:,.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"


_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write_page(path: Path, markdown: str, pictures: Iterable[Path], first_line: str = "") -> None:
    """Writes Markdown as a self-contained page: it loads nothing and runs nothing.

    Args:
        markdown: begins with its title. HTML in it is shown as text, since much of a report is data.
        pictures: PNG files to put into the page; other images of `markdown` are only named.
        first_line: an HTML comment.
    """
    from jinja2 import Environment
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    headings: list[tuple[str, object]] = []
    for opening, text in pairwise(tokens):
        if opening.type == "heading_open":
            opening.attrSet("id", f"part-{len(headings)}")
            headings.append((text.content, opening.attrs["id"]))
    embedded = {picture.name: b64encode(picture.read_bytes()).decode() for picture in pictures}
    for image in (child for token in tokens for child in token.children or [] if child.type == "image"):
        if content := embedded.get(str(image.attrs["src"])):
            image.attrSet("src", f"data:image/png;base64,{content}")
        else:
            image.type = "text"  # the description of an image of another source
    body = parser.renderer.render(tokens, parser.options, {})
    # A wide table scrolls in a box of its own. `<table>` is never data, whose angle brackets are escaped.
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")
    (title, _), *contents = headings
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _TEMPLATE.read_text(encoding="utf-8")
    )
    page = template.render(first_line=Markup(first_line), title=title, contents=contents, body=Markup(body))
    write_text(path, page + "\n")

"""What is in data folders as one HTML page, without anything to download."""

from dataclasses import dataclass
from pathlib import Path

from data_prep.common.command_line import redact
from data_prep.common.files import write_text
from data_prep.inspection.documents import Excerpt
from data_prep.inspection.statistics import Statistics
from data_prep.sharding.manifest import Manifest


@dataclass(frozen=True)
class Inspected:
    """All that the page shows of a folder."""

    folder: Path
    manifest: Manifest
    statistics: Statistics
    documents: list[Excerpt]


def write_page(path: Path, inspected: list[Inspected]) -> None:
    """Writes the page."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).with_name("page.html.jinja")).read_text(encoding="utf-8"))
    total = sum(one.statistics.tokens for one in inspected)
    write_text(path, template.render(inspected=inspected, total=total, redact=redact))

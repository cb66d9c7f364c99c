"""Examples of dropped documents, for the report."""

import json
from pathlib import Path
from typing import Any

from datatrove.data import Document

from data_prep.common.files import write_text
from data_prep.common.schema import read_json

_CHARACTERS = 600  # of an example


class KeepExamples:
    """Takes the place of datatrove's writer of excluded documents: keeps the first of each reason, in a file a task.

    Args:
        folder: of the files.
        name: of this filter, unless it is the only one of its step.
    """

    def __init__(self, folder: Path, name: str = "all") -> None:
        self.folder, self.name = folder, name
        self.rank: int | None = None
        self.found: dict[str, str] = {}

    def __enter__(self) -> "KeepExamples":
        return self

    def __exit__(self, *error: Any) -> None:
        """The files are whole at any time."""

    def write(self, document: Document, rank: int = 0) -> None:
        """Keeps the document if it is the first one that the task drops for this reason."""
        if rank != self.rank:
            self.rank, self.found = rank, {}
        reason = document.metadata.get("filter_reason", "dropped")
        if reason not in self.found:
            self.found[reason] = document.text[:_CHARACTERS]
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / f"{rank:05d}_{self.name}.json", json.dumps(self.found))


def read_examples(folder: Path) -> dict[str, str]:
    """One example for each reason, from the first task that has one."""
    examples: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        examples = read_json(path, dict[str, str]) | examples
    return dict(sorted(examples.items()))

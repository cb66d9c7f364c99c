"""Records that the manifest of a data folder and the report of a cleaning share."""

from dataclasses import dataclass, field
from typing import Any

from data_prep.common.schema import STRICT, Count


@dataclass(frozen=True)
class StepCounts:
    """Sizes before and after a cleaning step."""

    __pydantic_config__ = STRICT

    documents_in: Count
    documents_out: Count
    characters_in: Count
    characters_out: Count


@dataclass(frozen=True)
class CleaningStep(StepCounts):
    """A cleaning step, as in `cleaning.json`.

    Attributes:
        sources: the counts of each source.
        dropped: number of documents by datatrove's reason.
        examples: the beginning of a dropped document for each reason.
    """

    __pydantic_config__ = STRICT

    step: str
    settings: dict[str, Any]
    sources: dict[str, StepCounts]
    dropped: dict[str, Count]
    examples: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Position:
    """A position in a corpus: after `record` records of file number `file`; where an unfinished preparation continues,
    `tokens` tokens of the block that begins there are written already."""

    __pydantic_config__ = STRICT

    file: Count = 0
    record: Count = 0
    tokens: Count = 0

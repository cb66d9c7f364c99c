"""What the manifest of a data folder and the report of a cleaning hold: one dataclass for each kind of record."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.common.schema import STRICT, Count, Positive, Sha256


@dataclass(frozen=True)
class Shard:
    """One file: its name, `train` or `val`, how many tokens and document starts are in it, and its sha256."""

    __pydantic_config__ = STRICT

    file: str
    split: Literal["train", "val"]
    tokens: Positive
    documents: Count
    sha256: Sha256


@dataclass(frozen=True)
class SourceRecord:
    """Where the documents came from: what was asked for (`data_prep.reading.sources.Source`), and what was found.

    Attributes:
        source: `adopted` for shards that another program wrote, of which the rest is not known.
        commit: of the data set on the Hub.
        files, bytes, names_and_sizes: of the files that were read; the last is a hash.
    """

    __pydantic_config__ = STRICT

    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    where: list[str] = field(default_factory=list)
    commit: str | None = None
    files: Count = 0
    bytes: Count = 0
    names_and_sizes: str = ""


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that wrote the shards; `sha256` is that of `tokenizer/tokenizer.json`."""

    __pydantic_config__ = STRICT

    name: str
    vocab_size: Positive
    eos_token_id: Count
    sha256: Sha256


@dataclass(frozen=True)
class StepCounts:
    """What a step of the cleaning was given and what it left."""

    __pydantic_config__ = STRICT

    documents_in: Count
    documents_out: Count
    characters_in: Count
    characters_out: Count


@dataclass(frozen=True)
class CleaningStep(StepCounts):
    """A step that the documents went through, as `cleaning.json` has it.

    Attributes:
        sources: the counts of each source.
        dropped: documents by datatrove's reason for dropping them.
    """

    __pydantic_config__ = STRICT

    step: str
    settings: dict[str, Any]
    sources: dict[str, StepCounts]
    dropped: dict[str, Count]


@dataclass(frozen=True)
class Position:
    """Where preparation goes on: so many `tokens` into the documents that begin at a cursor of three numbers."""

    __pydantic_config__ = STRICT

    file: Count = 0
    record: Count = 0
    offset: Count = 0
    tokens: Count = 0

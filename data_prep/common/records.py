"""Records in the manifest of a data folder and in the report of a cleaning, one dataclass each."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.common.schema import STRICT, Count, Positive, Sha256

Split = Literal["train", "val"]
Format = Literal["npy", "bin"]
Dtype = Literal["uint16", "uint32"]


@dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
        documents: number of those that begin in it.
        text_bytes: size of the source's text in UTF-8; None where it is not known, and with GPT-2's kind of tokenizer,
            whose tokens tell it.
    """

    __pydantic_config__ = STRICT

    file: str
    split: Split
    tokens: Positive
    documents: Count
    sha256: Sha256
    text_bytes: Count | None = None


@dataclass(frozen=True)
class SourceSettings:
    """A request for documents, as in `data_prep.reading.sources.Source`."""

    __pydantic_config__ = STRICT

    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    tokens_column: str | None = None
    where: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SourceRecord(SourceSettings):
    """Origin of the documents: the request (`data_prep.reading.sources.Source`), and the files that were found.

    Attributes:
        source: "registered" for shards of another program; all else is unknown then.
        commit: of the data set on the Hub.
        names_and_sizes: hash over the names and sizes of the files.
    """

    __pydantic_config__ = STRICT

    commit: str | None = None
    files: Count = 0
    bytes: Count = 0
    names_and_sizes: str = ""


@dataclass(frozen=True)
class TokenizerRecord:
    """Tokenizer of the shards; `sha256` is the hash of `tokenizer/tokenizer.json`."""

    __pydantic_config__ = STRICT

    name: str
    vocab_size: Positive
    eos_token_id: Count
    sha256: Sha256


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
    """Where an unfinished preparation continues: after `tokens` tokens of the block that begins at the cursor of file,
    record, byte offset, and state of a stream of `datasets`."""

    __pydantic_config__ = STRICT

    file: Count = 0
    record: Count = 0
    offset: Count = 0
    state: dict[str, Any] | None = None
    tokens: Count = 0

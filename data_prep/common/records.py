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
    """A position in a corpus: after `record` records of file number `file`; where an unfinished preparation continues,
    `tokens` tokens of the block that begins there are written already."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}  # earlier preparations also wrote where the record is

    file: Count = 0
    record: Count = 0
    tokens: Count = 0

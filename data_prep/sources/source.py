"""Sources: the request for documents, its record in manifests, and the records of a cleaning."""

from dataclasses import MISSING, asdict, dataclass, field
from typing import Any, Literal

from data_prep.common.command_line import option, redact
from data_prep.common.schema import STRICT, Count

BUILTIN = "builtin"
Kind = Literal["text", "tokens", "messages"]


@dataclass(frozen=True)
class Source:
    """Request for documents."""

    __pydantic_config__ = STRICT

    source: str = option(
        MISSING,
        "'builtin' (the Python standard library's sources); a file, folder or glob of .parquet, .jsonl, .txt or what "
        "else `datasets` reads, local or as s3://, gs://, https://, ...; a folder of save_to_disk; or a data set of "
        "the Hub, streamed",
    )
    name: str | None = option(None, "configuration of the Hub data set, as in 'sample-10BT'")
    split: str = option("train", "split of the Hub data set, or of the folder of save_to_disk")
    revision: str | None = option(None, "branch, tag or commit of the Hub data set")
    text_column: str = option("text", "field of a record that holds the text")
    tokens_column: str | None = option(None, "field that holds ids of the tokenizer's tokens, instead of a text")
    where: tuple[str, ...] = option(
        (), "keep only records that satisfy this, as in 'int_score >= 3'; repeatable", action="append"
    )

    @property
    def column(self) -> str:
        """Field of a record that holds the document."""
        return self.tokens_column or self.text_column

    @property
    def kind(self) -> Kind:
        """Type of a document."""
        return "text" if self.tokens_column is None else "tokens"

    def describe(self) -> dict[str, Any]:
        """Fields that identify a source, without passwords in URLs."""
        return {**asdict(self), "source": redact(self.source)}


@dataclass(frozen=True)
class ConversationSource(Source):
    """Request for conversations: the field `text_column` holds a list of messages, each with a role and a content."""

    @property
    def kind(self) -> Kind:
        """As in `Source`."""
        return "messages"


@dataclass(frozen=True)
class SourceRecord(Source):
    """Where the documents came from, as recorded in the manifest: the request, and the files that were found.

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
    """A position in a corpus: after `record` records of file number `file`. In an unfinished preparation, `tokens`
    counts the tokens of the block starting there that are already written."""

    __pydantic_config__ = STRICT

    file: Count = 0
    record: Count = 0
    tokens: Count = 0

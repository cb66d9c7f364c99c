"""Requests for documents: the built-in corpus, files, and data sets on the Hub."""

from dataclasses import MISSING, asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_prep.common.command_line import option, redact
from data_prep.common.schema import STRICT, Count

if TYPE_CHECKING:
    from data_prep.reading.corpus import Corpus

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
        """The field of a record that holds the document."""
        return self.tokens_column or self.text_column

    @property
    def kind(self) -> Kind:
        """What a document is."""
        return "text" if self.tokens_column is None else "tokens"

    def resolve(self, commit: str | None = None, skip_bad_files: bool = False) -> "Corpus":
        """Finds what the source consists of (`UserError` if it cannot be read).

        Args:
            commit: of a data set on the Hub, from an earlier call.
            skip_bad_files: leave out and list a file that cannot be read, from there on.
        """
        from data_prep.reading.resolve import resolve

        return resolve(self, commit, skip_bad_files)

    def describe(self) -> dict[str, Any]:
        """The fields that distinguish two sources, without the passwords of URLs."""
        return {**asdict(self), "source": redact(self.source)}


@dataclass(frozen=True)
class ConversationSource(Source):
    """Request for conversations: lists of messages, each with a role and a content, in the field `text_column`."""

    @property
    def kind(self) -> Kind:
        """As in `Source`."""
        return "messages"


@dataclass(frozen=True)
class SourceRecord(Source):
    """Origin of the documents, in the manifest: the request, and the files that were found.

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

"""Requests for documents: the built-in corpus, files, databases, and data sets on the Hub."""

from dataclasses import MISSING, asdict, dataclass, replace
from typing import Any, Literal

from data_prep.common.command_line import UserError, first_line, option, redact
from data_prep.common.hub import limit_waiting
from data_prep.common.retries import Retries, is_transient
from data_prep.reading import streams
from data_prep.reading.builtin import BuiltinCorpus
from data_prep.reading.conditions import Condition
from data_prep.reading.corpus import Corpus, files_read
from data_prep.reading.fields import Kind
from data_prep.reading.files import FileCorpus, corpus_of_files, names_files
from data_prep.reading.formats import FORMATS, is_read_here

BUILTIN = "builtin"
# Schemes of databases that SQLAlchemy knows, a driver may follow: postgresql+psycopg://.
_DATABASES = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql")
RESOLVE_DELAYS = (1, 2, 4)  # seconds before each new attempt if the network fails


@dataclass(frozen=True)
class Source:
    """Request for documents; written into the manifest."""

    source: str = option(
        MISSING,
        "'builtin' (the Python standard library's sources); a file, folder or glob of .parquet, .jsonl, .txt, .warc or "
        "what else `datasets` reads, local or as s3://, gs://, https://, ...; a folder of save_to_disk; the URL of a "
        "database; or a data set of the Hub, streamed",
    )
    name: str | None = option(None, "configuration of the Hub data set, as in 'sample-10BT'; a database's query")
    split: str = option("train", "split of the Hub data set, or of the folder of save_to_disk")
    revision: str | None = option(None, "branch, tag or commit of the Hub data set")
    text_column: str = option("text", "field of a record that holds the text")
    tokens_column: str | None = option(None, "field that holds ids of the tokenizer's tokens, instead of a text")
    where: tuple[str, ...] = option(
        (), "keep only records that satisfy this, as in 'int_score >= 3'; repeatable", action="append"
    )
    on_bad_file: Literal["stop", "skip"] = option(
        "stop", "skip: leave out and list a file that cannot be read, from there on", choices=("stop", "skip")
    )

    @property
    def column(self) -> str:
        """The field of a record that holds the document."""
        return self.tokens_column or self.text_column

    @property
    def kind(self) -> Kind:
        """What a document is."""
        return "text" if self.tokens_column is None else "tokens"

    def resolve(self, commit: str | None = None) -> Corpus:
        """Finds what the source consists of (`UserError` if it cannot be read).

        Args:
            commit: of a data set on the Hub, from an earlier call.
        """
        conditions = tuple(map(Condition.parse, self.where))
        retries = Retries(RESOLVE_DELAYS, "run the same command again")
        while True:
            try:
                corpus = self._resolve(conditions, commit)
                break
            except UserError:
                raise
            except Exception as error:
                retries.wait(f"source {self.source!r}", error)
        if self.on_bad_file == "stop":
            return corpus
        if not isinstance(corpus, FileCorpus):
            name = redact(self.source)
            raise UserError(f"source {name!r} is not read file by file; --on_bad_file skip does not apply")
        return replace(corpus, bad_files={})

    def _resolve(self, conditions: tuple[Condition, ...], commit: str | None) -> Corpus:
        if self.source == BUILTIN:
            if self != Source(BUILTIN):
                options = "--name, --split, --text_column, --tokens_column, --on_bad_file and --where"
                raise UserError(f"source {BUILTIN!r} is plain text; {options} do not apply")
            return BuiltinCorpus.find(self)
        if self.source.split("://")[0].split("+")[0] in _DATABASES and "://" in self.source:
            return streams.corpus_of_query(self, conditions)
        if not names_files(self.source):
            return _corpus_on_the_hub(self, conditions, commit)
        if streams.saved_to_disk(self.source):
            return streams.corpus_saved_to_disk(self, conditions)
        return _corpus_of_found_files(self, conditions)

    def describe(self) -> dict[str, Any]:
        """The fields that distinguish two sources, without the passwords of URLs."""
        fields = {**asdict(self), "source": redact(self.source), "where": list(self.where)}
        del fields["on_bad_file"]  # may be given once there is such a file
        return fields


@dataclass(frozen=True)
class ConversationSource(Source):
    """Request for conversations: lists of messages, each with a role and a content, in the field `text_column`."""

    @property
    def kind(self) -> Kind:
        """As in `Source`."""
        return "messages"


def _corpus_of_found_files(source: Source, conditions: tuple[Condition, ...]) -> Corpus:
    """Of the files that are found, those that are read here, else those of one format that `datasets` reads;
    documentation only if there is nothing else."""
    from data_prep.reading.folders import count_by_suffix, find_files, is_documentation

    filesystem, found, hidden = find_files(source.source)
    here = [path for path in found if is_read_here(path)]
    paths = [path for path in here if not is_documentation(path)]
    others = [] if paths else [path for path in found if streams.format_of(path)]
    chosen = paths or others or here
    not_read = count_by_suffix(sorted({*found} - {*chosen}), hidden)
    if not chosen:
        formats, counts = ", ".join([*FORMATS, *streams.FORMATS]), files_read(0, not_read, {})
        raise UserError(f"source {source.source!r}: no file in it is in a format that is read: {formats}; {counts}")
    if different := [path for path in others if streams.format_of(path) != streams.format_of(others[0])]:
        several = f"files of several formats, {others[0]} and {different[0]}"
        raise UserError(f"source {source.source!r}: {several}; name one of them with a pattern")
    make = streams.corpus_of_other_files if others else corpus_of_files
    corpus = make(source, conditions, filesystem, chosen)
    return replace(corpus, not_read=not_read)


def _corpus_on_the_hub(source: Source, conditions: tuple[Condition, ...], commit: str | None) -> Corpus:
    import datasets
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    limit_waiting()
    try:
        commit = commit or HfApi().dataset_info(source.source, revision=source.revision).sha
        builder = datasets.load_dataset_builder(source.source, source.name, revision=commit)
    except (HfHubHTTPError, OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        if is_transient(error):
            raise
        text = f"source {source.source!r} is no local file, and the Hub's data set of that name cannot be read"
        raise UserError(f"{text}: {first_line(error)}") from error
    files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
    if source.split not in files:
        known = ", ".join(files) or "no data files"
        raise UserError(f"source {source.source!r} has no split {source.split!r}; it has: {known}")
    filesystem: Any = HfFileSystem()
    paths = [filesystem._strip_protocol(path) for path in files[source.split]]
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)  # one request for each folder
    all_sizes = {entry["name"]: entry["size"] for folder in folders for entry in filesystem.ls(folder, detail=True)}
    sizes = [all_sizes[path] for path in paths]
    if all(map(is_read_here, paths)):
        return FileCorpus(source, conditions, commit, paths, sizes, False, filesystem)
    return streams.corpus_of_builder(source, conditions, commit, builder, paths, sizes)

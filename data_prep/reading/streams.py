"""Sources that the `datasets` library streams: what is not read here itself."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.command_line import UserError, first_line, redact
from data_prep.common.retries import is_transient
from data_prep.reading.compression import suffixes
from data_prep.reading.conditions import Condition
from data_prep.reading.corpus import Corpus, ReadError
from data_prep.reading.fields import Fields
from data_prep.reading.readers import Block, Cursor, Reader

if TYPE_CHECKING:
    from data_prep.reading.sources import Source

# Formats, by datasets' names, that files on a disk or at a URL may have; those of the Hub's data sets may have any.
FORMATS = ("csv", "json", "arrow", "webdataset", "xml")
# A cell of CSV is text, which may be "NA", "null" or "007"; only an empty one is missing.
_CSV_CELLS = {"keep_default_na": False, "na_values": [""]}
_SAVED = ("state.json", "dataset_dict.json")  # of a `Dataset` and a `DatasetDict`, by `save_to_disk`
_SQL_ROWS = 1000  # at a time
# A stream uses no cache, but a builder of `datasets` makes its folder, unless that is on a remote file system.
_NO_CACHE = "memory://"
_NOT_RESUMED = "`datasets` cannot go on in the middle of it; export it to parquet first"


@dataclass(frozen=True)
class StreamCorpus(Corpus):
    """A stream of `datasets`. To go on, it returns to the shard and passes over the records before the position.

    Attributes:
        load: starts the stream.
    """

    load: Callable[[], Any]

    def bytes_before(self, start: Cursor) -> None:
        return None

    def part(self, number: int, count: int) -> "StreamCorpus":
        """As in `Corpus`: of whole shards if their number allows it, else every so many records."""
        from datasets.distributed import split_dataset_by_node

        return replace(self, load=lambda: split_dataset_by_node(self.load(), number, count))

    def _read_from(self, start: Cursor, every_field: bool) -> Iterator[Block]:
        name = redact(self.source.source)
        try:
            stream = self.load()
            if start.state is not None:
                stream.load_state_dict(start.state)
            yield from _Stream(stream, name, self.fields, start).blocks(self.fields.document)
        except UserError:
            raise
        except Exception as error:  # of `datasets`, and of all libraries that it reads with
            raise ReadError(name, error) from error


class _Stream(Reader):
    def __init__(self, stream: Any, name: str, fields: Fields, start: Cursor) -> None:
        self.stream, self.name, self.fields, self.start = stream, name, fields, start
        self.number = start.record
        self._check_count(start.state, "prepare a new folder")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for record in self.stream:
            self.number += 1
            yield self.fields.check(record)

    def where(self) -> str:
        return f"{self.name}, record {self.number}"

    def cursor(self) -> Cursor:
        if self.number == self.start.record:
            return self.start
        state = _state(self.stream, self.name)
        self._check_count(state, "install a newer version, and run the same command again")
        return Cursor(record=self.number, state=state)

    def _check_count(self, state: dict[str, Any] | None, remedy: str) -> None:
        """Refuses a state before the last record that was read: `datasets` would read records twice."""
        shard, count = _place(self.start.state) or (0, 0)
        least = max((shard, count + self.number - self.start.record), (0, self.number))
        if (place := _place(state)) is not None and place < least:
            behind = f"after {self.number:,} records, `datasets` would go on after {place[1]:,} of file {place[0] + 1}"
            raise UserError(f"source {self.name!r}: {behind}; {remedy}")

    def bytes_read(self) -> int:
        return 0


def _state(stream: Any, name: str) -> dict[str, Any]:
    """Where the reading of a stream is, as JSON has it (`UserError` for a stream that cannot say it)."""
    state = stream.state_dict()
    if json.loads(json.dumps(state, default=str)) != state:
        raise UserError(f"source {name!r}: {_NOT_RESUMED}")
    return state


def _place(state: dict[str, Any] | None) -> tuple[int, int] | None:
    """Index of the file, and number of records before the position in it, in the state of a stream that says so."""
    if state is None:
        return None
    if "shard_example_idx" in state:
        return state["shard_idx"], state["shard_example_idx"]
    place = _place(state.get("previous_state") or state.get("examples_iterable"))
    return place and (place[0], place[1] + state.get("num_chunks_since_previous_state", 0))


def saved_to_disk(path: str) -> bool:
    """Whether a folder was written by `save_to_disk` of `datasets`."""
    return any((Path(path) / name).is_file() for name in _SAVED)


def corpus_saved_to_disk(source: "Source", conditions: tuple[Condition, ...]) -> StreamCorpus:
    """The data set that `save_to_disk` wrote into a folder (`UserError` for another split than it has)."""
    from datasets import load_from_disk

    folder = Path(source.source).expanduser()
    if (folder / "dataset_dict.json").is_file():
        folder = folder / source.split
        if not folder.is_dir():
            splits = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir()))
            raise UserError(f"source {source.source!r} has no split {source.split!r}; it has: {splits}")
    paths = sorted(folder.glob("*.arrow"))

    def load() -> Any:
        return load_from_disk(str(folder)).to_iterable_dataset(num_shards=max(1, len(paths)))

    sizes = [path.stat().st_size for path in paths]
    return _checked(StreamCorpus(source, conditions, None, list(map(str, paths)), sizes, True, load))


def format_of(path: str) -> tuple[str, dict[str, Any]] | None:
    """The name by which `datasets` loads a file, and its arguments; None for a file that is not read."""
    from datasets.packaged_modules import _EXTENSION_TO_MODULE

    found = _EXTENSION_TO_MODULE.get(suffixes(path)[0])
    return found if found and found[0] in FORMATS else None


def corpus_of_other_files(
    source: "Source", conditions: tuple[Condition, ...], filesystem: Any, paths: Sequence[str]
) -> StreamCorpus:
    """Files of one format that `datasets` reads."""
    from datasets import load_dataset

    name, options = format_of(paths[0]) or ("", {})
    if name == "csv":
        options = options | _CSV_CELLS | {"converters": {source.column: str}}
    is_local = "file" in filesystem.protocol
    urls = [path if is_local else filesystem.unstrip_protocol(path) for path in paths]

    def load() -> Any:
        files, where = {"train": urls}, {"cache_dir": _NO_CACHE}
        return load_dataset(name, data_files=files, split="train", streaming=True, **where, **options)

    return _checked(StreamCorpus(source, conditions, None, paths, list(map(filesystem.size, paths)), is_local, load))


def corpus_of_query(source: "Source", conditions: tuple[Condition, ...]) -> StreamCorpus:
    """The rows of an SQL query, which is the source's `name`, at a database's URL (`UserError` if it has no order)."""
    from datasets.packaged_modules.sql.sql import Sql

    query = source.name or ""
    if importlib.util.find_spec("sqlalchemy") is None:
        raise UserError('a database needs SQLAlchemy: pip install -e ".[sql]" -c constraints.txt, and its own driver')
    if "order by" not in " ".join(query.lower().split()):
        example = '--name "SELECT text FROM documents ORDER BY id"'
        raise UserError(f"source {redact(source.source)!r}: a database needs a query with an order, as in {example}")

    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(source.source)
    except ArgumentError as error:
        raise UserError(f"source {redact(source.source)!r}: {first_line(error)}") from error
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).is_file():
        raise UserError(f"source {source.source!r}: no such file")  # SQLite would make it

    def load() -> Any:
        builder = Sql(sql=query, con=source.source, chunksize=_SQL_ROWS, cache_dir=_NO_CACHE)
        return builder.as_streaming_dataset(split="train")

    return _checked(StreamCorpus(source, conditions, None, [], [], source.source.startswith("sqlite:"), load))


def corpus_of_builder(
    source: "Source",
    conditions: tuple[Condition, ...],
    commit: str | None,
    builder: Any,
    paths: Sequence[str],
    sizes: Sequence[int],
) -> StreamCorpus:
    """A data set of the Hub whose files are in another format than those that are read here."""
    from datasets.packaged_modules.csv.csv import CsvConfig

    if isinstance(config := builder.config, CsvConfig) and config.keep_default_na and config.na_values is None:
        converters = {} if config.features else {source.column: str}  # features are types of all columns
        vars(config).update(_CSV_CELLS, converters=config.converters or converters)

    def load() -> Any:
        return builder.as_streaming_dataset(split=source.split)

    return _checked(StreamCorpus(source, conditions, commit, paths, sizes, False, load))


def _checked(corpus: StreamCorpus) -> StreamCorpus:
    """Starts the stream once, so that what is wrong is known before a folder is made."""
    name = redact(corpus.source.source)
    try:
        _state(corpus.load(), name)
    except (UserError, NotImplementedError) as error:
        raise UserError(f"source {name!r}: {_NOT_RESUMED}") from error
    except Exception as error:
        if is_transient(error):
            raise
        raise UserError(f"source {name!r}: {first_line(error)}") from error
    return corpus

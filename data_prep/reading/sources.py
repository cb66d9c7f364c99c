"""Sources of documents: the built-in corpus, files, and data sets on the Hub, which are lists of files too."""

import glob
import hashlib
import os
import random
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError, first_line, option, redact
from data_prep.common.records import CleaningStep, SourceRecord
from data_prep.common.retries import Retries, is_transient
from data_prep.common.schema import read_json
from data_prep.reading.conditions import Condition
from data_prep.reading.readers import SUFFIXES, Block, Cursor, read_file

BUILTIN = "builtin"
# Files in the output of data_prep.clean: from the start on, and once it is complete.
CLEANING_CONFIG, CLEANING_REPORT = "config.json", "cleaning.json"
# Seconds before each new attempt if the network fails: to find a source, and to read it.
RESOLVE_DELAYS, RETRY_DELAYS = (1, 2, 4), (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)
_BUILTIN_BLOCK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Source:
    """Request for documents; written into the manifest."""

    source: str = option(
        MISSING,
        "'builtin' (the Python standard library's sources); a file, folder or glob of .parquet, .jsonl or .txt "
        "(those two also .gz, .zst), local or as s3://, gs://, https://, ...; or a data set of the Hub, streamed",
    )
    name: str | None = option(None, "configuration of the Hub data set, as in 'sample-10BT'")
    split: str = option("train", "split of the Hub data set")
    revision: str | None = option(None, "branch, tag or commit of the Hub data set")
    text_column: str = option("text", "field of a record that holds the text")
    where: tuple[str, ...] = option(
        (), "keep only records that satisfy this, as in 'int_score >= 3'; repeatable", action="append"
    )

    def resolve(self, commit: str | None = None) -> "Corpus":
        """Finds the files of the source (`UserError` if there are none that can be read).

        Args:
            commit: of a data set on the Hub, from an earlier call.
        """
        conditions = tuple(map(Condition.parse, self.where))
        retries = Retries(RESOLVE_DELAYS, "run the same command again")
        while True:
            try:
                if self.source == BUILTIN:
                    return _builtin_corpus(self)
                if names_files(self.source):
                    return _corpus_of_files(self, conditions, self.source)
                return _corpus_on_the_hub(self, conditions, commit)
            except UserError:
                raise
            except Exception as error:
                retries.wait(f"source {self.source!r}", error)

    def describe(self) -> dict[str, Any]:
        """The fields that distinguish two sources, without the passwords of URLs."""
        return {**asdict(self), "source": redact(self.source), "where": list(self.where)}


@dataclass(frozen=True)
class Corpus:
    """The files of a source, in reading order.

    Attributes:
        filesystem: of `fsspec`; None for the built-in corpus.
        sizes: of the files, in bytes.
        commit: of the data set on the Hub.
    """

    source: Source
    conditions: tuple[Condition, ...]
    filesystem: Any
    paths: Sequence[str]
    sizes: Sequence[int]
    commit: str | None = None

    @property
    def is_local(self) -> bool:
        return self.filesystem is None or "file" in self.filesystem.protocol

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.sizes)

    def describe(self) -> SourceRecord:
        """The manifest's record of the source; a change of its files' names or sizes changes it."""
        names = "".join(f"{path.rpartition('/')[2]} {n}\n" for path, n in zip(self.paths, self.sizes, strict=True))
        return SourceRecord(
            **self.source.describe(),
            commit=self.commit,
            files=len(self.paths),
            bytes=self.bytes,
            names_and_sizes=hashlib.sha256(os.fsencode(names)).hexdigest(),
        )

    def cleaning(self) -> list[CleaningStep]:
        """Report of `data_prep.clean` from the files' folder or its parent; empty if another program wrote it."""
        if self.filesystem is None or not self.is_local:
            return []
        folder = Path(self.paths[0]).parent
        for candidate in (folder, folder.parent):
            if (candidate / CLEANING_CONFIG).is_file() and (candidate / CLEANING_REPORT).is_file():
                try:
                    return read_json(candidate / CLEANING_REPORT, list[CleaningStep])
                except UserError as error:
                    print(f"not taken for a report of data_prep.clean: {error}", file=sys.stderr)
        return []

    def documents(self) -> Iterator[str]:
        """Texts of all documents."""
        for block in self.blocks(Cursor()):
            yield from block.texts

    def records(self) -> Iterator[dict[str, Any]]:
        """All records with all fields, including records without text."""
        for path, size in zip(self.paths, self.sizes, strict=True):
            for block in read_file(self.filesystem, path, size, [self.source.text_column], Cursor(), every_field=True):
                yield from block.texts

    def blocks(self, start: Cursor, retry_delays: Sequence[float] = RETRY_DELAYS) -> Iterator[Block]:
        """Non-empty documents from `start` on, in a fixed order, a few megabytes at a time.

        Args:
            retry_delays: seconds before each new attempt after the network failed; a block resets them.

        Raises:
            UserError: for a file or record that cannot be read, and once all delays are used.
        """
        retries = Retries(retry_delays, "the same command goes on from the last finished shard")
        while True:
            try:
                for block in self._read_from(start):
                    yield block
                    start = block.stop
                    retries.failures = 0
                return
            except _ReadError as error:
                retries.wait(*error.args)

    def _read_from(self, start: Cursor) -> Iterator[Block]:
        if self.source.source == BUILTIN:
            yield from _builtin_blocks(self.paths, start.record)
            return
        if start.file >= len(self.paths):
            raise UserError(f"preparation continues in file {start.file} of {len(self.paths)}; prepare a new folder")
        columns = [self.source.text_column, *(c.column for c in self.conditions)]
        for number in range(start.file, len(self.paths)):
            cursor = start if number == start.file else Cursor(file=number)
            path = self.paths[number]
            try:
                for block in read_file(self.filesystem, path, self.sizes[number], columns, cursor):
                    yield replace(block, texts=self._texts(block.texts))
            except UserError:
                raise
            except Exception as error:
                raise _ReadError(path, error) from error

    def _texts(self, records: list[dict[str, Any]]) -> list[str]:
        kept = (r[self.source.text_column] for r in records if all(c.holds(r) for c in self.conditions))
        return [text for text in kept if text and not text.isspace()]


class _ReadError(Exception):
    """A path, and the error of reading it."""


def names_files(source: str) -> bool:
    """Whether a source is a path or a pattern rather than the name `OWNER/NAME` of a data set."""
    return (
        "://" in source
        or source.startswith(("/", ".", "~"))
        or source.endswith(SUFFIXES)
        or any(c in source for c in "*?[")
        or source.count("/") != 1
        or Path(source).exists()
    )


def _corpus_of_files(source: Source, conditions: tuple[Condition, ...], pattern: str) -> Corpus:
    import fsspec

    if "://" not in pattern:
        pattern = str(Path(pattern).expanduser())
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:  # a protocol that is unknown or not installed
        raise UserError(f"source {pattern!r}: {' '.join(str(error).split())}") from error
    if filesystem.isdir(path):
        if Path(pattern, CLEANING_CONFIG).is_file() and not Path(pattern, CLEANING_REPORT).is_file():
            raise UserError(f"source {pattern!r}: its cleaning has not finished; run the same data_prep.clean again")
        found = [p for p in filesystem.find(path) if p.endswith(SUFFIXES)]
    elif filesystem.exists(path):
        found = [path]
    elif any(c in path for c in "*?["):
        found = [p for p in filesystem.glob(_with_literal_folders(filesystem, path)) if filesystem.isfile(p)]
    else:
        raise UserError(f"source {pattern!r}: no such file or folder")
    paths = sorted(found)
    for name in paths if "file" in filesystem.protocol else ():  # reading a pipe or a device may never end
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise UserError(f"{name}: not a regular file; name a file, or a folder of files")
    return _checked(Corpus(source, conditions, filesystem, paths, [filesystem.size(p) for p in paths]))


def _with_literal_folders(filesystem: Any, pattern: str) -> str:
    """Escapes the leading folders of a pattern that exist under their literal name."""
    parts = pattern.split("/")
    count = 1
    while count < len(parts) and filesystem.isdir("/".join(parts[: count + 1])):
        count += 1
    return "/".join([glob.escape("/".join(parts[:count])), *parts[count:]])


def _corpus_on_the_hub(source: Source, conditions: tuple[Condition, ...], commit: str | None) -> Corpus:
    import datasets
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

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
    sizes = {entry["name"]: entry["size"] for folder in folders for entry in filesystem.ls(folder, detail=True)}
    return _checked(Corpus(source, conditions, filesystem, paths, [sizes[path] for path in paths], commit))


def _checked(corpus: Corpus) -> Corpus:
    if not corpus.paths:
        raise UserError(f"source {corpus.source.source!r}: no file in it ends in {', '.join(SUFFIXES)}")
    for path, size in zip(corpus.paths, corpus.sizes, strict=True):
        if not path.endswith(SUFFIXES):
            raise UserError(f"{path}: not one of the formats {', '.join(SUFFIXES)}")
        if size is None:
            raise UserError(f"{path}: its server does not say how large it is; download it first")
        if corpus.conditions and ".txt" in path[-8:]:
            raise UserError(f"{path}: plain text has no columns for --where to look at")
    return corpus


def _standard_library() -> list[Path]:
    """Python sources of the running interpreter's standard library, without its character tables."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
    files = sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))
    if not files:
        raise UserError(f"the built-in corpus is empty: no Python sources in {root}; give another --source")
    return files


def _builtin_corpus(source: Source) -> Corpus:
    if source != Source(BUILTIN):
        raise UserError(f"source {BUILTIN!r} is plain text; --name, --split, --text_column and --where do not apply")
    paths = _standard_library()
    return Corpus(source, (), None, list(map(str, paths)), [path.stat().st_size for path in paths])


def _builtin_blocks(paths: Sequence[str], start: int) -> Iterator[Block]:
    """Distinct texts in a fixed random order, so that any stretch is a sample of the whole corpus."""
    distinct = list(dict.fromkeys(Path(path).read_text(encoding="utf-8", errors="ignore") for path in paths))
    texts = [text for text in random.Random(0).sample(distinct, len(distinct)) if text.strip()]
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and size < _BUILTIN_BLOCK_CHARACTERS:
            size += len(texts[stop])
            stop += 1
        yield Block(texts[start:stop], Cursor(record=start), Cursor(record=stop), size)
        start = stop

"""Where documents come from: the built-in corpus, files, data sets of the Hub. All but the first are lists of files."""

import glob
import hashlib
import os
import random
import stat
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError, redact
from data_prep.common.records import CleaningStep, SourceRecord
from data_prep.common.retries import Retries, is_transient
from data_prep.common.schema import read_json
from data_prep.reading.conditions import Condition
from data_prep.reading.readers import SUFFIXES, Block, Cursor, read_file

BUILTIN = "builtin"
# What data_prep.clean leaves in its output: at the start, and once all is done.
CLEANING_CONFIG, CLEANING_REPORT = "config.json", "cleaning.json"
# Seconds to wait before each new attempt where the network fails: to find a source, and to read it. A block that gets
# through starts them anew.
RESOLVE_DELAYS, RETRY_DELAYS = (1, 2, 4), (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)
_RAW_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """What the user asks for; written into the manifest.

    Attributes:
        source: `builtin`, a file, folder or glob (local or of any `fsspec` protocol), or a data set on the Hub.
        name, split, revision: of the data set on the Hub.
        text_column: the field of a record that holds its text.
        where: conditions that a record must satisfy, all of them.
    """

    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    where: tuple[str, ...] = ()

    def resolve(self, commit: str | None = None) -> "Corpus":
        """Find the files behind the name. `commit` pins a data set of the Hub to what an earlier call has found.

        Raises:
            UserError: for a name that stands for no files that we can read.
        """
        conditions = tuple(map(Condition.parse, self.where))
        retries = Retries(RESOLVE_DELAYS, "run the same command again")
        while True:
            try:
                if self.source == BUILTIN:
                    return _corpus_of_the_standard_library(self)
                if names_files(self.source):
                    return _corpus_of_files(self, conditions, self.source)
                return _corpus_of_the_hub(self, conditions, commit)
            except UserError:
                raise
            except Exception as error:
                retries.wait(f"source {self.source!r}", error)

    def describe(self) -> dict[str, Any]:
        """The fields that make two sources different, without the passwords of addresses."""
        return {**asdict(self), "source": redact(self.source), "where": list(self.where)}


@dataclass(frozen=True)
class Corpus:
    """The files of a source, in the order in which they are read.

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
        """What the manifest says of the source: enough to notice that its files have other names or sizes."""
        names = "".join(
            f"{path.rpartition('/')[2]} {size}\n" for path, size in zip(self.paths, self.sizes, strict=True)
        )
        return SourceRecord(
            **self.source.describe(),
            commit=self.commit,
            files=len(self.paths),
            bytes=self.bytes,
            names_and_sizes=hashlib.sha256(os.fsencode(names)).hexdigest(),
        )

    def cleaning(self) -> list[CleaningStep]:
        """The report that `data_prep.clean` has left in the folder of these files, or in the one above it; none where
        a file of that name is another program's."""
        if self.filesystem is None or not self.is_local:
            return []
        folder = Path(self.paths[0]).parent
        for place in (folder, folder.parent):
            if (place / CLEANING_CONFIG).is_file() and (place / CLEANING_REPORT).is_file():
                try:
                    return read_json(place / CLEANING_REPORT, list[CleaningStep])
                except UserError as error:
                    print(f"not taken for a report of data_prep.clean: {error}", file=sys.stderr)
        return []

    def documents(self) -> Iterator[str]:
        """All documents, one string each."""
        for block in self.blocks(Cursor()):
            yield from block.texts

    def records(self) -> Iterator[dict[str, Any]]:
        """All records of these files with all of their fields, those without text among them."""
        for path, size in zip(self.paths, self.sizes, strict=True):
            for block in read_file(self.filesystem, path, size, [self.source.text_column], Cursor(), every_field=True):
                yield from block.texts

    def blocks(self, start: Cursor, retry_delays: Sequence[float] = RETRY_DELAYS) -> Iterator[Block]:
        """The documents from `start` on, always in the same order, a few megabytes at a time; empty ones are left out.

        Where the network fails, goes on from the last block after each of `retry_delays` in turn, in seconds.

        Raises:
            UserError: for a file or record that cannot be read as text, with its name and place, and for a network
                that fails for longer than all delays.
        """
        retries = Retries(retry_delays, "the same command goes on from the last finished shard")
        while True:
            try:
                for block in self._read_from(start):
                    yield block
                    start = block.stop
                    retries.failures = 0
                return
            except _Unreadable as broken:
                retries.wait(broken.path, broken.__cause__)

    def _read_from(self, start: Cursor) -> Iterator[Block]:
        if self.source.source == BUILTIN:
            yield from _builtin_blocks(self.paths, start.record)
            return
        if start.file >= len(self.paths):
            raise UserError(
                f"the place to go on from is in file {start.file} of {len(self.paths)}; prepare a new folder"
            )
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
                raise _Unreadable(path) from error

    def _texts(self, records: list[dict[str, Any]]) -> list[str]:
        kept = (r[self.source.text_column] for r in records if all(c.holds(r) for c in self.conditions))
        return [text for text in kept if text and not text.isspace()]


class _Unreadable(Exception):
    """Reading `path` failed, by the error that this one is from."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


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
    except (ImportError, ValueError) as error:  # a protocol that is unknown, or whose package is not installed
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
    if "file" in filesystem.protocol:
        _check_regular(paths)
    return _checked(Corpus(source, conditions, filesystem, paths, [filesystem.size(p) for p in paths]))


def _with_literal_folders(filesystem: Any, pattern: str) -> str:
    """A pattern with its first folders, those that exist under the name as it stands, taken literally."""
    parts = pattern.split("/")
    count = 1
    while count < len(parts) and filesystem.isdir("/".join(parts[: count + 1])):
        count += 1
    return "/".join([glob.escape("/".join(parts[:count])), *parts[count:]])


def _check_regular(paths: Sequence[str]) -> None:
    """Refuse pipes and devices, reading of which may never end (`UserError`)."""
    for path in paths:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: not a regular file; name a file, or a folder of files")


def _corpus_of_the_hub(source: Source, conditions: tuple[Condition, ...], commit: str | None) -> Corpus:
    import datasets
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    try:
        commit = commit or HfApi().dataset_info(source.source, revision=source.revision).sha
        builder = datasets.load_dataset_builder(source.source, source.name, revision=commit)
    except (HfHubHTTPError, OSError, ValueError, ImportError, datasets.exceptions.DatasetsError) as error:
        if is_transient(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"source {source.source!r} is no local file, and the Hub's data set of that name cannot be read: {reason}"
        ) from error
    files = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
    if source.split not in files:
        raise UserError(
            f"source {source.source!r} has no split {source.split!r}; it has: {', '.join(files) or 'no data files'}"
        )
    filesystem = HfFileSystem()
    paths = [filesystem._strip_protocol(path) for path in files[source.split]]
    folders = dict.fromkeys(path.rpartition("/")[0] for path in paths)  # a request for each, not for each file
    sizes = {entry["name"]: entry["size"] for folder in folders for entry in filesystem.ls(folder, detail=True)}
    return _checked(Corpus(source, conditions, filesystem, paths, [sizes[path] for path in paths], commit))


def _checked(corpus: Corpus) -> Corpus:
    if not corpus.paths:
        raise UserError(f"source {corpus.source.source!r}: no file in it ends in {', '.join(SUFFIXES)}")
    if wrong := [path for path in corpus.paths if not path.endswith(SUFFIXES)]:
        raise UserError(f"{wrong[0]}: not one of the formats {', '.join(SUFFIXES)}")
    if unknown := [path for path, size in zip(corpus.paths, corpus.sizes, strict=True) if size is None]:
        raise UserError(f"{unknown[0]}: its server does not say how large it is; download it first")
    if corpus.conditions and (plain := [path for path in corpus.paths if ".txt" in path[-8:]]):
        raise UserError(f"{plain[0]}: plain text has no columns for --where to look at")
    return corpus


def _standard_library() -> list[Path]:
    """The sources of the running interpreter's standard library, without its tables of characters."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
    files = sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))
    if not files:
        raise UserError(f"the built-in corpus is empty: no Python sources in {root}; give another --source")
    return files


def _corpus_of_the_standard_library(source: Source) -> Corpus:
    if source != Source(BUILTIN):
        raise UserError(f"source {BUILTIN!r} is plain text; --name, --split, --text_column and --where do not apply")
    paths = _standard_library()
    return Corpus(source, (), None, list(map(str, paths)), [path.stat().st_size for path in paths])


def _builtin_blocks(paths: Sequence[str], start: int) -> Iterator[Block]:
    """Each different text once, in a fixed random order: any stretch of the corpus is a sample of the whole."""
    texts = dict.fromkeys(Path(path).read_text(encoding="utf-8", errors="ignore") for path in paths)
    texts = [text for text in random.Random(0).sample(list(texts), len(texts)) if text.strip()]
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and size < _RAW_BLOCK:
            size += len(texts[stop])
            stop += 1
        yield Block(texts[start:stop], Cursor(record=start), Cursor(record=stop), size)
        start = stop

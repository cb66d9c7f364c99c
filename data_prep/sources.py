"""Where documents come from: the built-in corpus, local files, data sets of the Hub."""

import glob
import io
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.cli import UserError

BUILTIN = "builtin"
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
MAX_TEXT_DOCUMENT = 64 * 1024  # characters; a longer text file is read as several documents


@dataclass(frozen=True)
class Source:
    """Where documents come from; written into the manifest as it is.

    Attributes:
        source: `builtin`, a local file, folder or glob pattern, or the name of a data set on the Hub.
        name, split, revision: of the data set on the Hub.
        text_column: the field of a record that holds its text.
    """

    source: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def files(self) -> list[Path]:
        """The local files of this source in the order of their names; none for a data set on the Hub.

        Raises:
            UserError: for a pattern or a path that names no file we can read.
        """
        if self.source == BUILTIN:
            return _standard_library()
        path = Path(self.source).expanduser()
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
        elif any(c in self.source for c in "*?["):
            found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        elif (
            self.source.count("/") == 1
            and not self.source.startswith(("/", ".", "~"))
            and not path.name.endswith(SUFFIXES)
        ):
            return []
        else:
            raise UserError(f"source {self.source!r}: no such file or folder")
        if not found:
            raise UserError(f"source {self.source!r}: no file in it ends in {', '.join(SUFFIXES)}")
        if wrong := [p for p in found if not p.name.endswith(SUFFIXES)]:
            raise UserError(f"{wrong[0]}: not one of the formats {', '.join(SUFFIXES)}")
        return found

    def documents(self) -> Iterator[str]:
        """The documents, one string each, always in the same order; empty ones are left out.

        Raises:
            UserError: for a file or record that cannot be read as text, with its name and line.
        """
        files = self.files()
        if self.source == BUILTIN:
            texts: Iterator[str] = _shuffled_without_copies(files)
        elif files:
            texts = (text for path in files for text in self._read(path))
        else:
            texts = self._stream_from_hub()
        return (text for text in texts if text.strip())

    def _read(self, path: Path) -> Iterator[str]:
        try:
            if path.suffix == ".txt":
                yield from _cut_at_blank_lines(path.read_text(encoding="utf-8"))
            elif path.suffix == ".parquet":
                yield from self._read_parquet(path)
            else:
                yield from self._read_jsonl(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}") from error

    def _read_jsonl(self, path: Path) -> Iterator[str]:
        import pyarrow

        with io.BufferedReader(pyarrow.input_stream(str(path), compression="detect")) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise UserError(f"{path}, line {number}: not a JSON object but {type(record).__name__}")
                yield self._text(record, f"{path}, line {number}")

    def _read_parquet(self, path: Path) -> Iterator[str]:
        import pyarrow
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path}: not a parquet file ({error})") from error
        with file:
            columns = file.schema_arrow.names
            if self.text_column not in columns:
                raise UserError(f"{path}: no column {self.text_column!r} among {columns}; name one with --text_column")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[self.text_column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield self._text({self.text_column: value}, f"{path}, row {row}")

    def _stream_from_hub(self) -> Iterator[str]:
        import datasets

        try:
            stream = datasets.load_dataset(
                self.source, self.name, split=self.split, revision=self.revision, streaming=True
            )
            for number, record in enumerate(stream, start=1):
                yield self._text(record, f"{self.source}, record {number}")
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"source {self.source!r} is no local file, and the Hub's data set of that name cannot be read: {reason}"
            ) from error

    def _text(self, record: dict[str, Any], where: str) -> str:
        if self.text_column not in record:
            raise UserError(f"{where}: no field {self.text_column!r} among {list(record)}; name one with --text_column")
        text = record[self.text_column]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {self.text_column!r} is not text but {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: field {self.text_column!r} is not text ({error})") from error
        return text


def _standard_library() -> list[Path]:
    """The sources of the running interpreter's standard library, without its tables of characters."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "encodings", "pydoc_data"}
    files = sorted(p for p in root.rglob("*.py") if not skipped.intersection(p.relative_to(root).parts))
    if not files:
        raise UserError(f"the built-in corpus is empty: no Python sources in {root}; give another --source")
    return files


def _shuffled_without_copies(files: list[Path]) -> Iterator[str]:
    """Each different text once, in a fixed random order: any stretch of the corpus is a sample of the whole."""
    texts = dict.fromkeys(path.read_text(encoding="utf-8", errors="ignore") for path in files)
    yield from random.Random(0).sample(list(texts), len(texts))


def _cut_at_blank_lines(text: str) -> Iterator[str]:
    """A long text in pieces of at most `MAX_TEXT_DOCUMENT` characters, cut at a blank line, else at a line's end."""
    start = 0
    while len(text) - start > MAX_TEXT_DOCUMENT:
        stop = start + MAX_TEXT_DOCUMENT
        for separator in ("\n\n", "\n"):
            found = text.rfind(separator, start + MAX_TEXT_DOCUMENT // 2, stop)
            if found != -1:
                stop = found + len(separator)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]

"""Removes evaluation items from training text, as GPT-3 did (Brown et al. 2020, arXiv:2005.14165, appendix C).

A word is a lower-cased text between white space, without punctuation. Texts are compared by n-grams of 13 words, as
64-bit hashes.
"""

import functools
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text
from data_prep.sources.formats import parse_record

NGRAM = 13  # words
SHORTEST_NGRAM = 8  # words; below, appendix C found too many collisions by chance
WINDOW = 200  # characters cut on each side of a collision
SHORTEST_PIECE = 200  # characters
MOST_PIECES = 10  # a document cut into more is dropped
COMMON_DOCUMENTS = 10  # n-grams in more documents than these are common phrases, and are kept

_HELLASWAG = ["ctx", "endings"]
_NOT_IN_WORDS = re.compile(r"[^\w\s]|_")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomials of hashes


def read_items(path: Path, fields: list[str] | None = None) -> Iterator[list[str]]:
    """Reads the items of an evaluation file; each is a list of texts that must not occur in training data.

    An item is a paragraph of a .txt file, or a record of a .jsonl file. With `fields`, its texts are these fields one
    after another, once for each choice in a field that lists choices: a question followed by each answer. Without,
    HellaSwag's `ctx` and `endings` are used if present, else every string of the record is a text. Raises a `UserError`
    for a file that cannot be read, and a record without one of `fields`.
    """
    text = read_text(path)
    if path.suffix == ".txt":
        yield from ([paragraph] for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip())
        return
    # Not splitlines, which also splits at separators that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _texts(parse_record(line, where), fields, where)


def _texts(record: dict[str, Any], fields: list[str] | None, where: str) -> list[str]:
    if fields is None and not all(name in record for name in _HELLASWAG):
        return [text for value in record.values() for text in _strings(value)]
    parts = []
    for name in fields or _HELLASWAG:
        if not (strings := _strings(record.get(name))):
            raise UserError(f"{where}: no text in a field {name!r} among {list(record)}; name others with fields")
        parts.append(strings)
    return [" ".join(choice) for choice in itertools.product(*parts)]


def _strings(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def split_words(text: str) -> list[str]:
    """Splits `text` into words, ignoring punctuation, symbols and combining marks (they do not separate words)."""
    return _NOT_IN_WORDS.sub("", text.lower()).split()


@functools.lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def _spans(text: str) -> np.ndarray:
    """Character indices of the starts and ends of `split_words(text)`, `[words, 2]`."""
    return np.array([found.span() for found in re.finditer(r"\S+", text) if split_words(found[0])])


def _ngrams(words: list[str], lengths: Iterable[int]) -> Iterator[np.ndarray]:
    """Hashes of the n-grams starting at each word, for each length in ascending order, `[n-grams]` uint64."""
    values = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    hashes, done = np.zeros(len(words) + 1, dtype=np.uint64), 0
    for length in lengths:
        while done < length:
            hashes = (hashes[:-1] + values[done:]) * _BASE
            done += 1
        yield hashes + np.uint64(length)


@dataclass(frozen=True)
class Index:
    """N-grams of evaluation texts, for lookup.

    Attributes:
        hashes: `[n-grams]` uint64, sorted and unique.
        lengths: numbers of words of the n-grams, ascending: `NGRAM`, and the length of each shorter text.
    """

    hashes: np.ndarray
    lengths: tuple[int, ...]

    @classmethod
    def build(cls, texts: Iterable[str], length: int = NGRAM) -> "Index":
        """Indexes all n-grams of `length` words; a shorter text counts as one n-gram if it has `SHORTEST_NGRAM` words.

        Section 4 defines a leaked example as a whole short text; appendix C defines the minimum length.
        """
        found, lengths = [np.empty(0, dtype=np.uint64)], set()
        for text in texts:
            words = split_words(text)
            if (own := min(len(words), length)) >= SHORTEST_NGRAM:
                found += _ngrams(words, [own])
                lengths.add(own)
        return cls(np.unique(np.concatenate(found)), tuple(sorted(lengths)))

    def find(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Finds n-grams of the index in `text`.

        Returns:
            For each occurrence, its index in `hashes`, `[found]`, and its first and last character, `[found, 2]`.
        """
        indices, words = [np.empty(0, dtype=np.int64)], [np.empty((0, 2), dtype=np.int64)]
        for length, ngrams in zip(self.lengths, _ngrams(split_words(text), self.lengths), strict=True):
            hits = np.flatnonzero(self._prefixes[ngrams >> np.uint64(40)])
            index = np.minimum(np.searchsorted(self.hashes, ngrams[hits]), len(self.hashes) - 1)
            equal = self.hashes[index] == ngrams[hits]
            indices.append(index[equal])
            words.append(np.stack([hits[equal], hits[equal] + length - 1], axis=1))
        first, last = np.concatenate(words).T
        spans = _spans(text) if len(first) else np.empty((0, 2), dtype=np.int64)
        return np.concatenate(indices), np.stack([spans[first, 0], spans[last, 1]], axis=1)

    @functools.cached_property
    def _prefixes(self) -> np.ndarray:
        """Whether each prefix of 24 bits occurs: a table instead of a search, for nearly all n-grams of a text."""
        prefixes = np.zeros(2**24, dtype=bool)
        prefixes[self.hashes >> np.uint64(40)] = True
        return prefixes

    def without(self, dropped: np.ndarray) -> "Index":
        """Returns the index without the n-grams selected by `dropped`, `[n-grams]` bool."""
        return Index(self.hashes[~dropped], self.lengths if not dropped.all() else ())


def count_documents(index: Index, texts: Iterable[str]) -> np.ndarray:
    """Number of `texts` that contain each n-gram of the index, `[n-grams]` int64."""
    counts = np.zeros(len(index.hashes), dtype=np.int64)
    for text in texts:
        counts[np.unique(index.find(text)[0])] += 1
    return counts


def cut(text: str, spans: np.ndarray) -> list[str]:
    """Removes the `spans`, `[collisions, 2]` characters, and `WINDOW` characters on each side; returns the pieces.

    Drops pieces shorter than `SHORTEST_PIECE`, and all of a text that is cut into more than `MOST_PIECES`, including
    short ones: many questions in a row have only short pieces between them.
    """
    if not len(spans):
        return [text]
    pieces, end = [], 0
    for first, last in sorted(spans.tolist()):
        if first - WINDOW > end:
            pieces.append(text[end : first - WINDOW])
        end = max(end, last + WINDOW)
    if end < len(text):
        pieces.append(text[end:])
    return [piece for piece in pieces if len(piece) >= SHORTEST_PIECE] if len(pieces) <= MOST_PIECES else []

"""Removes evaluation items from training text, as GPT-3 did (Brown et al. 2020, arXiv:2005.14165, appendix C).

A word is a lower-cased text between white space, without punctuation. Texts are compared by n-grams of 13 words, as
64-bit rolling hashes: the time is linear in the text for any n.
"""

import functools
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NGRAM = 13  # words
SHORTEST_NGRAM = 8  # words; below, appendix C found too many collisions by chance
WINDOW = 200  # characters cut on each side of a collision
SHORTEST_PIECE = 200  # characters
MOST_PIECES = 10  # a document cut into more is dropped
COMMON_DOCUMENTS = 10  # n-grams in more documents than these are common phrases, and are kept

# Odd, and so invertible modulo 2**64.
_CHARACTER_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_SEPARATOR, _IGNORED = 0xFFFFFFFF, 0xFFFFFFFE
_CACHED_POWERS = 1 << 20  # of each base: enough for most documents


@dataclass(frozen=True)
class Words:
    """Words of a text: hashes, `[words]` uint64, and the character indices of their starts and ends."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def ngrams(self, length: int) -> np.ndarray:
        """Hash of the `length` words from each word on, `[words - length + 1]` uint64."""
        if len(self.hashes) < length:
            return np.empty(0, dtype=np.uint64)
        first = np.arange(len(self.hashes) - length + 1)
        return _mix(_hash_ranges(self.hashes, first, first + length, _WORD_BASE) + np.uint64(length))


def split_words(text: str) -> Words:
    """Words of `text`. Punctuation, symbols and control characters are ignored: they do not separate words."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = _lower_case()[codes]
    indices = np.flatnonzero(codes < _IGNORED)
    # Characters with the same number of separators before them belong to the same word.
    word = np.cumsum(codes == _SEPARATOR)[indices]
    first = np.flatnonzero(np.diff(word, prepend=-1))
    last = np.append(first[1:], len(indices))[: len(first)]
    hashes = _mix(_hash_ranges(_mix(codes[indices].astype(np.uint64)), first, last, _CHARACTER_BASE))
    return Words(hashes, indices[first], indices[last - 1] + 1)


def _hash_ranges(values: np.ndarray, first: np.ndarray, last: np.ndarray, base: int) -> np.ndarray:
    """`sum(values[first + i] * base**i)` modulo 2**64 over each range, as a difference of cumulative sums."""
    size = len(values) + 1
    sums = np.zeros(size, dtype=np.uint64)
    np.cumsum(values * _powers(base, size)[:-1], out=sums[1:])
    return (sums[last] - sums[first]) * _powers(base, size, inverse=True)[first]


def _powers(base: int, size: int, inverse: bool = False) -> np.ndarray:
    """`base**i`, or `base**-i`, for `i` below `size`, modulo 2**64."""
    if size <= _CACHED_POWERS:
        return _cached_powers(base, _CACHED_POWERS, inverse)[:size]
    return _compute_powers(base, size, inverse)


def _compute_powers(base: int, size: int, inverse: bool) -> np.ndarray:
    factors = np.full(size, pow(base, -1, 2**64) if inverse else base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


_cached_powers = functools.cache(_compute_powers)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood 2014): every input bit changes every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _lower_case() -> np.ndarray:
    """Lower case of every code point, or `_SEPARATOR` or `_IGNORED`.

    One character for one, unlike `str.lower`, so that indices stay those of the text.
    """
    table = np.full(sys.maxunicode + 1, _IGNORED, dtype=np.uint32)
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character.isspace():
            table[code] = _SEPARATOR
        elif unicodedata.category(character)[0] in "LMN":
            lower = character.lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    return table


@dataclass(frozen=True)
class Index:
    """N-grams of evaluation texts.

    Attributes:
        hashes: `[n-grams]` uint64, sorted and unique.
        lengths: numbers of words of the n-grams: `NGRAM`, and the length of each shorter text.
    """

    hashes: np.ndarray
    lengths: tuple[int, ...]

    @classmethod
    def build(cls, texts: Iterable[str], length: int = NGRAM) -> "Index":
        """Indexes the n-grams of `length` words; a shorter text of at least `SHORTEST_NGRAM` words as a whole.

        Section 4 defines a leaked example as a whole short text; appendix C defines the minimum length.
        """
        found, lengths = [np.empty(0, dtype=np.uint64)], set()
        for text in texts:
            words = split_words(text)
            if (own := ngram_length(len(words.hashes), length)) is not None:
                found.append(np.unique(words.ngrams(own)))
                lengths.add(own)
        return cls(np.unique(np.concatenate(found)), tuple(sorted(lengths)))

    def find(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Finds n-grams of the index in `text`.

        Returns:
            For each occurrence, its index in `hashes`, `[found]`, and its first and last character, `[found, 2]`.
        """
        words = split_words(text)
        indices, spans = [np.empty(0, dtype=np.int64)], [np.empty((0, 2), dtype=np.int64)]
        for length in self.lengths:
            ngrams = words.ngrams(length)
            hits = np.flatnonzero(self._prefixes[ngrams >> np.uint64(40)])
            index = np.minimum(np.searchsorted(self.hashes, ngrams[hits]), len(self.hashes) - 1)
            equal = self.hashes[index] == ngrams[hits]
            hits = hits[equal]
            indices.append(index[equal])
            spans.append(np.stack([words.starts[hits], words.ends[hits + length - 1]], axis=1))
        return np.concatenate(indices), np.concatenate(spans)

    @functools.cached_property
    def _prefixes(self) -> np.ndarray:
        """Whether each prefix of 24 bits occurs: a table instead of a search, for nearly all n-grams of a text."""
        prefixes = np.zeros(2**24, dtype=bool)
        prefixes[self.hashes >> np.uint64(40)] = True
        return prefixes

    def without(self, dropped: np.ndarray) -> "Index":
        """The index without the n-grams where `dropped`, `[n-grams]` bool, is true."""
        return Index(self.hashes[~dropped], self.lengths if not dropped.all() else ())

    def save(self, path: Path) -> None:
        """Writes an `.npz` file."""
        np.savez(path, hashes=self.hashes, lengths=np.array(self.lengths, dtype=np.int64))

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Reads the file of `save`."""
        with np.load(path) as file:
            return cls(file["hashes"], tuple(file["lengths"].tolist()))


def ngram_length(words: int, longest: int) -> int | None:
    """Length of the n-grams by which a text of `words` words is searched; None for a text that is too short."""
    length = min(words, longest)
    return length if length >= SHORTEST_NGRAM else None


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

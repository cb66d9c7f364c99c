"""Evaluation items cut out of training text, as GPT-3 did it (Brown et al. 2020, arXiv:2005.14165, appendix C).

A word is what stands between white space, lower-cased, without punctuation. Texts are compared by n-grams of 13 words,
as 64-bit hashes, each computed from the one before it: the time is linear in the text, whatever n is.
"""

import functools
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

NGRAM = 13  # words
SHORTEST_NGRAM = 8  # words; below, appendix C found too many collisions by chance
WINDOW = 200  # characters cut on each side of a collision
SHORTEST_PIECE = 200  # characters
MOST_PIECES = 10  # a document cut into more is dropped
COMMON_DOCUMENTS = 10  # n-grams in more documents than these are phrases that many texts share, and stay

# Odd, so that they have an inverse modulo 2**64.
_CHARACTER_BASE, _WORD_BASE = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_SEPARATES, _IGNORED = 0xFFFFFFFF, 0xFFFFFFFE
_KEPT = 1 << 20  # powers of each base: enough for most documents, made once


@dataclass(frozen=True)
class Words:
    """The words of a text: their hashes, `[words]` uint64, and where each begins and ends, in its characters."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def ngrams(self, length: int) -> np.ndarray:
        """The hash of the `length` words from each word on, `[words - length + 1]` uint64."""
        if len(self.hashes) < length:
            return np.empty(0, dtype=np.uint64)
        first = np.arange(len(self.hashes) - length + 1)
        return _mix(_hash_ranges(self.hashes, first, first + length, _WORD_BASE) + np.uint64(length))


def split_words(text: str) -> Words:
    """The words of `text`; punctuation, symbols and control characters are neither part of a word nor end one."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    codes = _lower_case()[codes]
    places = np.flatnonzero(codes < _IGNORED)
    # Each kept character belongs to the word that as many separators precede.
    word = np.cumsum(codes == _SEPARATES)[places]
    first = np.flatnonzero(np.diff(word, prepend=-1))
    last = np.append(first[1:], len(places))[: len(first)]
    hashes = _mix(_hash_ranges(_mix(codes[places].astype(np.uint64)), first, last, _CHARACTER_BASE))
    return Words(hashes, places[first], places[last - 1] + 1)


def _hash_ranges(values: np.ndarray, first: np.ndarray, last: np.ndarray, base: int) -> np.ndarray:
    """`sum(values[first + i] * base**i)` modulo 2**64 over each range, as a difference of sums from the start."""
    size = len(values) + 1
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _powers(base, size)[:-1], out=sums[1:])
    return (sums[last] - sums[first]) * _powers(base, size, inverse=True)[first]


def _powers(base: int, size: int, inverse: bool = False) -> np.ndarray:
    """`base**i`, or `base**-i`, for `i` below `size`, modulo 2**64."""
    return _kept_powers(base, _KEPT, inverse)[:size] if size <= _KEPT else _make_powers(base, size, inverse)


def _make_powers(base: int, size: int, inverse: bool) -> np.ndarray:
    factors = np.full(size, pow(base, -1, 2**64) if inverse else base, dtype=np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


_kept_powers = functools.cache(_make_powers)


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood 2014): every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.cache
def _lower_case() -> np.ndarray:
    """For every code point its lower case, or that it separates words, or that it is ignored.

    One character for one, unlike `str.lower`, so that places stay those of the text.
    """
    table = np.full(sys.maxunicode + 1, _IGNORED, dtype=np.uint32)
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character.isspace():
            table[code] = _SEPARATES
        elif unicodedata.category(character)[0] in "LMN":
            lower = character.lower()
            table[code] = ord(lower) if len(lower) == 1 else code
    return table


@dataclass(frozen=True)
class Index:
    """The n-grams of evaluation texts.

    Attributes:
        hashes: `[n-grams]` uint64, sorted, each once.
        lengths: how many words the n-grams have: `NGRAM`, and the length of each shorter text.
    """

    hashes: np.ndarray
    lengths: tuple[int, ...]

    @classmethod
    def build(cls, texts: Iterable[str], length: int = NGRAM) -> "Index":
        """Index the n-grams of `length` words; of a shorter text, the whole, if it has `SHORTEST_NGRAM` words.

        The whole of a shorter text is section 4's definition of a leaked example, the least length appendix C's.
        """
        found, lengths = [np.empty(0, dtype=np.uint64)], set()
        for text in texts:
            words = split_words(text)
            if (own := ngram_length(len(words.hashes), length)) is not None:
                found.append(np.unique(words.ngrams(own)))
                lengths.add(own)
        return cls(np.unique(np.concatenate(found)), tuple(sorted(lengths)))

    def find(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Where `text` has n-grams of the index.

        Returns:
            For each occurrence, its place in `hashes`, `[found]`, and its first and last character, `[found, 2]`.
        """
        words = split_words(text)
        places, spans = [np.empty(0, dtype=np.int64)], [np.empty((0, 2), dtype=np.int64)]
        for length in self.lengths:
            ngrams = words.ngrams(length)
            hits = np.flatnonzero(self._prefixes[ngrams >> np.uint64(40)])
            place = np.minimum(np.searchsorted(self.hashes, ngrams[hits]), len(self.hashes) - 1)
            equal = self.hashes[place] == ngrams[hits]
            hits = hits[equal]
            places.append(place[equal])
            spans.append(np.stack([words.starts[hits], words.ends[hits + length - 1]], axis=1))
        return np.concatenate(places), np.concatenate(spans)

    @functools.cached_property
    def _prefixes(self) -> np.ndarray:
        """Which first 24 bits occur: one look-up instead of a search, for all but a few n-grams of ordinary text."""
        prefixes = np.zeros(2**24, dtype=bool)
        prefixes[self.hashes >> np.uint64(40)] = True
        return prefixes

    def without(self, dropped: np.ndarray) -> "Index":
        """The same index without the n-grams where `dropped`, `[n-grams]` bool, is true."""
        return Index(self.hashes[~dropped], self.lengths if not dropped.all() else ())


def ngram_length(words: int, longest: int) -> int | None:
    """The words of the n-grams that a text of so many words is searched by; None for one too short to tell."""
    length = min(words, longest)
    return length if length >= SHORTEST_NGRAM else None


def cut(text: str, spans: np.ndarray) -> list[str]:
    """What is left of `text` without the `spans`, `[collisions, 2]` characters, and `WINDOW` on each side of each.

    Pieces shorter than `SHORTEST_PIECE` are dropped. Nothing is left of a text that falls into more than `MOST_PIECES`,
    the short ones counted: many questions in a row leave only short pieces between them.
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

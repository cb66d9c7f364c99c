"""Order of the training data: a pure function of the seed and of one number, the count of consumed sequences.

The documents of an epoch, in that epoch's order, continue an endless stream of tokens; sequence i of T tokens begins at
token `i * T`. Sequences cross the ends of shards and epochs, so that no token is dropped.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.shards import open_shard

# Sequences are permuted within windows of about this size: large enough to mix documents, small enough that a batch
# reads only a few files.
_WINDOW_TOKENS = 100_000_000
# Smaller shards are copied into memory, at most a window: each map is an open file, of which a process may have only
# some hundred, and a window of larger shards is a dozen of them.
_MAPPED_TOKENS = 1 << 23


@dataclass(frozen=True)
class _Window:
    """Tokens `start` to `stop` of the stream, which are window `number` of an epoch."""

    epoch: int
    number: int
    start: int
    stop: int


class TokenStream:
    """All tokens of a split, epoch after epoch, each once an epoch.

    `shuffled` permutes the shards and the documents within a shard in each epoch; `sequential` keeps the order on disk,
    as build-nanogpt does (which drops tokens that do not fill a batch at the end of a shard).
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, order: str, seed: int) -> None:
        self.shuffled, self.seed = order == "shuffled", seed
        self.eos_token_id, self.vocab_size = manifest.tokenizer.eos_token_id, manifest.tokenizer.vocab_size
        shards = [shard for shard in manifest.shards if shard.split == split]
        self.paths = [folder / shard.file for shard in shards]
        self.lengths = np.array([shard.tokens for shard in shards], dtype=np.int64)
        self.tokens_per_epoch = int(self.lengths.sum())
        self.shards_per_window = max(1, _WINDOW_TOKENS // int(self.lengths.max()))
        self._shard_order = lru_cache(maxsize=2)(self._permuted_shards)
        self._documents = lru_cache(maxsize=2 + self.shards_per_window)(self._permuted_documents)

    def window(self, token: int) -> _Window:
        """Window of consecutive shards, in the epoch's order, that holds token `token` of the stream."""
        epoch, i = self._locate(token)
        number, bounds = i // self.shards_per_window, self._shard_order(epoch)[1]
        first, last = (min(n * self.shards_per_window, len(self.paths)) for n in (number, number + 1))
        return _Window(epoch, number, bounds[first], bounds[last])

    def _locate(self, token: int) -> tuple[int, int]:
        """Epoch of a token, and the index of its shard in that epoch's order."""
        epoch = token // self.tokens_per_epoch
        return epoch, bisect_right(self._shard_order(epoch)[1], token) - 1

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of the stream, `[count]` int64."""
        pieces = []
        while count > 0:
            epoch, i = self._locate(start)
            order, bounds = self._shard_order(epoch)
            pieces.append(self._documents(epoch, order[i]).read(start - bounds[i], min(count, bounds[i + 1] - start)))
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return _joined(pieces).astype(np.int64)

    def permutation(self, kind: str, count: int, epoch: int, number: int = 0) -> np.ndarray:
        """Permutation of `count` items, a function of seed and arguments; the identity if `sequential`."""
        if not self.shuffled:
            return np.arange(count)
        kind_number = ("shards", "documents", "sequences").index(kind)
        return np.random.default_rng([self.seed, kind_number, epoch, number]).permutation(count)

    def _permuted_shards(self, epoch: int) -> tuple[list[int], list[int]]:
        """Shards in the order of `epoch`, and their first tokens in the stream, followed by the epoch's end."""
        order = self.permutation("shards", len(self.paths), epoch)
        return order.tolist(), (epoch * self.tokens_per_epoch + _offsets(self.lengths[order])).tolist()

    def _permuted_documents(self, epoch: int, shard: int) -> "_Documents":
        tokens = open_shard(self.paths[shard])
        # A view is still mapped, and faster to slice.
        tokens = np.array(tokens) if len(tokens) < _MAPPED_TOKENS else tokens.view(np.ndarray)
        if len(tokens) != self.lengths[shard] or int(tokens.max()) >= self.vocab_size:
            raise UserError(
                f"{self.paths[shard]}: {len(tokens):,} tokens, the largest id {int(tokens.max())}; the manifest says "
                f"{self.lengths[shard]:,} tokens of a vocabulary of {self.vocab_size:,}; run python -m data_prep.verify"
            )
        starts = np.flatnonzero(tokens == self.eos_token_id)
        if not len(starts) or starts[0] != 0:  # a shard may begin within a document
            starts = np.concatenate([[0], starts])
        lengths = np.diff(starts, append=len(tokens))
        order = self.permutation("documents", len(starts), epoch, shard)
        return _Documents(tokens, starts[order], _offsets(lengths[order]))


@dataclass(frozen=True)
class _Documents:
    """Documents of a shard in some order: number i is at `starts[i]` on disk and at `offsets[i]` in that order."""

    tokens: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` in that order."""
        stop, pieces = start + count, []
        i = int(self.offsets.searchsorted(start, side="right")) - 1
        while start < stop:
            begin = int(self.starts[i]) + start - int(self.offsets[i])
            length = min(stop, int(self.offsets[i + 1])) - start
            pieces.append(self.tokens[begin : begin + length])
            start, i = start + length, i + 1
        return _joined(pieces)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Sequences:
    """Sequences of a stream by position: T tokens and the label of the last one.

    A shuffled stream also permutes the sequences of a window: otherwise a batch would consist of a few long documents,
    and the documents of a small shard would be learned and forgotten together.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        self.stream, self.length = stream, length
        self._window = (_Window(0, 0, 0, 0), 0, np.empty(0))

    @property
    def per_epoch(self) -> float:
        """Sequences in an epoch; a fraction, as a sequence may cross its end."""
        return self.stream.tokens_per_epoch / self.length

    def read(self, position: int) -> np.ndarray:
        """The sequence at `position`, `[T + 1]` int64."""
        return self.stream.read(self.index(position) * self.length, self.length + 1)

    def index(self, position: int) -> int:
        """Index in the stream of the sequence at `position`."""
        token = position * self.length
        window, first, permutation = self._window
        if not window.start <= token < window.stop:
            window = self.stream.window(token)
            # The sequences that begin in it.
            first, stop = (-(-bound // self.length) for bound in (window.start, window.stop))
            permutation = self.stream.permutation("sequences", stop - first, window.epoch, window.number)
            self._window = window, first, permutation
        return first + int(permutation[position - first])


def shares_of(manifests: Sequence[Manifest], weights: Sequence[float] | None) -> list[float]:
    """Share of each folder in the training tokens, summing to 1: by `weights` in any unit, or else by size."""
    weights = weights or [manifest.tokens("train") for manifest in manifests]
    return [weight / sum(weights) for weight in weights]


def training_order(
    folders: Sequence[Path],
    manifests: Sequence[Manifest],
    shares: Sequence[float],
    split: str,
    order: str,
    seed: int,
    length: int,
) -> "Mixture":
    """Sequences of a split of data folders, each with its share, in the order of a run."""
    streams = (TokenStream(f, manifest, split, order, seed) for f, manifest in zip(folders, manifests, strict=True))
    return Mixture([Sequences(stream, length) for stream in streams], shares)


class Mixture:
    """Sequences of several sources as one stream by position.

    In any prefix each source has its share, up to a fraction of a sequence, evenly spread. The source at a position
    depends on the weights only. Each source has its own epochs.
    """

    _BLOCK = 1024

    def __init__(self, sources: Sequence[Sequences], weights: Sequence[float]) -> None:
        self.sources = sources
        # Integers, so that rounding is the same on every machine.
        self.bounds = list(accumulate(round(weight / sum(weights) * 10**12) for weight in weights))
        self._block = lru_cache(maxsize=4)(self._make_block)

    def read(self, position: int) -> np.ndarray:
        """The sequence at `position`, `[T + 1]` int64."""
        block, i = divmod(position, self._BLOCK)
        source, number = self._block(block)
        return self.sources[source[i]].read(int(number[i]))

    def consumed(self, position: int) -> list[int]:
        """Number of sequences of each source before `position`."""
        block, i = divmod(position, self._BLOCK)
        before = np.bincount(self._block(block)[0][:i], minlength=len(self.sources))
        return [base + int(count) for base, count in zip(self._counts(block * self._BLOCK), before, strict=True)]

    def _counts(self, total: int) -> list[int]:
        """Number of sequences of each source among the first `total`, a multiple of the block."""
        return [stop - start for start, stop in pairwise([0, *(total * b // self.bounds[-1] for b in self.bounds)])]

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a block, its source and the index of the sequence in that source."""
        first, last = (np.array(self._counts(n * self._BLOCK)) for n in (number, number + 1))
        counts = last - first
        source = np.repeat(np.arange(len(counts)), counts)
        which = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((which + 0.5) / counts[source], kind="stable")
        return source[order], (which + first[source])[order]

"""The order of the training data: a pure function of the seed and of one number, the count of sequences consumed.

The documents of an epoch, in that epoch's order, are one stretch of an endless stream of tokens; sequence i of T tokens
begins at its token `i * T`. Nothing is dropped where a shard or an epoch ends: a sequence reaches over.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.shards import open_shard

# Sequences are permuted within windows of whole shards, about so many tokens: enough to mix documents well, few enough
# to read from a handful of files.
_WINDOW_TOKENS = 100_000_000


@dataclass(frozen=True)
class _Stretch:
    """From token `start` to token `stop` of the stream, within an epoch, lies the shard or the window `number`."""

    epoch: int
    number: int
    start: int
    stop: int


class TokenStream:
    """All tokens of a split, epoch after epoch, each exactly once an epoch.

    `shuffled` permutes the shards and the documents within a shard anew each epoch; `sequential` leaves them as they
    lie on disk, which is build-nanogpt's order (but that drops what does not fill a batch at a shard's end).
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, order: str, seed: int) -> None:
        self.shuffled = order == "shuffled"
        self.seed = seed
        self.eos_token_id, self.vocab_size = manifest.tokenizer.eos_token_id, manifest.tokenizer.vocab_size
        shards = [shard for shard in manifest.shards if shard.split == split]
        self.paths = [folder / shard.file for shard in shards]
        self.lengths = np.array([shard.tokens for shard in shards], dtype=np.int64)
        self.tokens_per_epoch = int(self.lengths.sum())
        self.shards_per_window = max(1, _WINDOW_TOKENS // int(self.lengths.max()))
        self._shard_order = lru_cache(maxsize=2)(self._permuted_shards)
        self._documents = lru_cache(maxsize=2 + self.shards_per_window)(self._permuted_documents)

    def shard(self, token: int) -> _Stretch:
        """The shard that token `token` of the stream lies in."""
        epoch, i = self._locate(token)
        order, bounds = self._shard_order(epoch)
        return _Stretch(epoch, order[i], bounds[i], bounds[i + 1])

    def window(self, token: int) -> _Stretch:
        """The window of consecutive shards, in the epoch's order of them, that token `token` of the stream lies in."""
        epoch, i = self._locate(token)
        number, bounds = i // self.shards_per_window, self._shard_order(epoch)[1]
        first, last = (min(n * self.shards_per_window, len(self.paths)) for n in (number, number + 1))
        return _Stretch(epoch, number, bounds[first], bounds[last])

    def _locate(self, token: int) -> tuple[int, int]:
        """The epoch of a token, and the place of its shard in that epoch's order."""
        epoch = token // self.tokens_per_epoch
        return epoch, bisect_right(self._shard_order(epoch)[1], token) - 1

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of the stream, `[count]` int64."""
        pieces = []
        while count > 0:
            shard = self.shard(start)
            documents = self._documents(shard.epoch, shard.number)
            piece = documents.read(start - shard.start, min(count, shard.stop - start))
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return _joined(pieces).astype(np.int64)

    def permutation(self, what: str, count: int, epoch: int, number: int = 0) -> np.ndarray:
        """A permutation of `count` things, from the seed and the arguments alone; as they lie if `sequential`."""
        if not self.shuffled:
            return np.arange(count)
        kind = ("shards", "documents", "sequences").index(what)
        return np.random.default_rng([self.seed, kind, epoch, number]).permutation(count)

    def _permuted_shards(self, epoch: int) -> tuple[list[int], list[int]]:
        """The shards in the order of `epoch`, and the tokens of the stream that they begin at, the epoch's end last."""
        order = self.permutation("shards", len(self.paths), epoch)
        bounds = epoch * self.tokens_per_epoch + np.concatenate([[0], np.cumsum(self.lengths[order])])
        return order.tolist(), bounds.tolist()

    def _permuted_documents(self, epoch: int, shard: int) -> "_Documents":
        tokens = open_shard(self.paths[shard]).view(np.ndarray)  # still mapped, and quicker to slice
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
        return _Documents(tokens, starts[order], np.concatenate([[0], np.cumsum(lengths[order])]))


@dataclass(frozen=True)
class _Documents:
    """The documents of a shard in some order: number i is at `starts[i]` on disk and at `offsets[i]` in that order."""

    tokens: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` in that order."""
        stop = start + count
        pieces = []
        i = int(self.offsets.searchsorted(start, side="right")) - 1
        while start < stop:
            begin = int(self.starts[i]) + start - int(self.offsets[i])
            length = min(stop, int(self.offsets[i + 1])) - start
            pieces.append(self.tokens[begin : begin + length])
            start, i = start + length, i + 1
        return _joined(pieces)


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Sequences:
    """The sequences of a stream, T tokens and the label of the last one each, by position.

    In a shuffled stream the sequences of a window are permuted as well: a batch of consecutive ones would be a few long
    documents rather than a sample of many, and a small shard's documents would be learned and forgotten together.
    """

    def __init__(self, stream: TokenStream, length: int) -> None:
        self.stream = stream
        self.length = length
        self._window = (_Stretch(0, 0, 0, 0), 0, np.empty(0))

    @property
    def per_epoch(self) -> float:
        """Sequences in an epoch; no whole number, as a sequence may reach over its end."""
        return self.stream.tokens_per_epoch / self.length

    def read(self, position: int) -> np.ndarray:
        """The sequence at `position`, `[T + 1]` int64."""
        return self.stream.read(self.index(position) * self.length, self.length + 1)

    def index(self, position: int) -> int:
        """Which sequence of the stream stands at `position`."""
        token = position * self.length
        window, first, permutation = self._window
        if not window.start <= token < window.stop:
            window, first, permutation = self._window = self._permuted(self.stream.window(token))
        return first + int(permutation[position - first])

    def _permuted(self, window: _Stretch) -> tuple[_Stretch, int, np.ndarray]:
        """A window, the first sequence that begins in it, and the order of those that do."""
        first, stop = (-(-token // self.length) for token in (window.start, window.stop))
        return window, first, self.stream.permutation("sequences", stop - first, window.epoch, window.number)


def shares_of(manifests: Sequence[Manifest], weights: Sequence[float] | None) -> list[float]:
    """The share of each folder in the training tokens, summing to 1: by `weights` in any unit, or else by size."""
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
    """The sequences of a split of data folders, each with its share, in the order of a run."""
    sources = [
        Sequences(TokenStream(folder, manifest, split, order, seed), length)
        for folder, manifest in zip(folders, manifests, strict=True)
    ]
    return Mixture(sources, shares)


class Mixture:
    """Sequences of several sources, each with its share, as one stream by position.

    Of any number of sequences from the start, each source has its share but for a fraction of a sequence, spread
    evenly; which source stands where depends on the weights alone. Each source goes through its own epochs.
    """

    _BLOCK = 1024

    def __init__(self, sources: Sequence[Sequences], weights: Sequence[float]) -> None:
        self.sources = sources
        # Whole numbers, so that no rounding depends on the machine.
        parts = [round(weight / sum(weights) * 10**12) for weight in weights]
        self.bounds = [sum(parts[: i + 1]) for i in range(len(parts))]
        self._block = lru_cache(maxsize=4)(self._make_block)

    def read(self, position: int) -> np.ndarray:
        """The sequence at `position`, `[T + 1]` int64."""
        block, place = divmod(position, self._BLOCK)
        source, number = self._block(block)
        return self.sources[source[place]].read(int(number[place]))

    def consumed(self, position: int) -> list[int]:
        """How many sequences of each source stand before `position`."""
        block, place = divmod(position, self._BLOCK)
        before = np.bincount(self._block(block)[0][:place], minlength=len(self.sources))
        return [base + int(count) for base, count in zip(self._share(block * self._BLOCK), before, strict=True)]

    def _share(self, count: int) -> list[int]:
        """How many of the first `count` sequences, a multiple of the block, each source has; they add up to `count`."""
        ends = [0, *(count * bound // self.bounds[-1] for bound in self.bounds)]
        return [stop - start for start, stop in pairwise(ends)]

    def _make_block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a block of positions: each one's source, and which of that source's sequences it is."""
        first, last = (self._share(n * self._BLOCK) for n in (number, number + 1))
        counts = [stop - start for start, stop in zip(first, last, strict=True)]
        source = np.repeat(np.arange(len(counts)), counts)
        which = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((which + 0.5) / np.array(counts)[source], kind="stable")
        return source[order], (which + np.array(first)[source])[order]

"""The order of the training data: an endless stream of tokens, a pure function of seed, epoch and position."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.manifest import Manifest
from data_prep.shards import open_shard
from modeling.loss import IGNORE_INDEX


class TokenStream:
    """All tokens of a split, epoch after epoch, each exactly once an epoch.

    `shuffled` permutes the shards and the documents within a shard anew each epoch; `sequential` leaves them as they
    lie on disk, in build-nanogpt's order (which drops what does not fill a batch at a shard's end; this does not).
    """

    def __init__(self, folder: Path, manifest: Manifest, split: str, order: str, seed: int) -> None:
        self.shuffled = order == "shuffled"
        self.seed = seed
        self.eos_token_id = manifest.tokenizer["eos_token_id"]
        shards = [shard for shard in manifest.shards if shard.split == split]
        self.paths = [folder / shard.file for shard in shards]
        self.lengths = np.array([shard.tokens for shard in shards], dtype=np.int64)
        self.tokens_per_epoch = int(self.lengths.sum())
        self._shard = lru_cache(maxsize=4)(self._load_shard)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of the endless stream, `[count]` int64."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.tokens_per_epoch)
            for shard in self._shard_order(epoch):
                length = int(self.lengths[shard])
                if offset < length:
                    piece = self._shard(epoch if self.shuffled else 0, int(shard)).read(offset, count)
                    break
                offset -= length
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces).astype(np.int64)

    def _shard_order(self, epoch: int) -> np.ndarray:
        if not self.shuffled:
            return np.arange(len(self.paths))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.paths))

    def _load_shard(self, epoch: int, shard: int) -> "_Shard":
        tokens = open_shard(self.paths[shard])
        starts = np.flatnonzero(tokens == self.eos_token_id)
        if not len(starts) or starts[0] != 0:  # a shard may begin within a document
            starts = np.concatenate([[0], starts])
        order = np.arange(len(starts))
        if self.shuffled:
            order = np.random.default_rng([self.seed, epoch, shard]).permutation(len(starts))
        lengths = np.diff(starts, append=len(tokens))[order]
        return _Shard(tokens, starts[order], np.concatenate([[0], np.cumsum(lengths)]))


class _Shard:
    """One shard in the order of an epoch: document i lies at `starts[i]` on disk and at `offsets[i]` in that order."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, offsets: np.ndarray) -> None:
        self.tokens, self.starts, self.offsets = tokens, starts, offsets

    def read(self, start: int, count: int) -> np.ndarray:
        """At most `count` tokens from `start` on; fewer where the shard ends."""
        stop = min(start + count, int(self.offsets[-1]))
        pieces = []
        document = int(np.searchsorted(self.offsets, start, side="right")) - 1
        while start < stop:
            begin = int(self.starts[document]) + start - int(self.offsets[document])
            length = min(stop, int(self.offsets[document + 1])) - start
            pieces.append(self.tokens[begin : begin + length])
            start, document = start + length, document + 1
        return np.concatenate(pieces)


class Batches:
    """The sequences of a stream: sequence i is tokens `i * T` to `i * T + T`, its labels those one further on.

    The position in the data is the number of sequences consumed, whatever the number of processes.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, device: torch.device) -> None:
        self.stream = stream
        self.sequence_length = sequence_length
        self.device = device

    def sequences(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """`input_ids` and `shift_labels`, each `[count, T]` int64, of sequences `first` to `first + count`."""
        length = self.sequence_length
        tokens = torch.from_numpy(self.stream.read(first * length, count * length + 1)).to(self.device)
        return tokens[:-1].view(count, length), tokens[1:].view(count, length)

    def shared_out(self, count: int, batch_size: int, rank: int, num_processes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the first `count` sequences, in batches of `batch_size`.

        Every rank gets as many batches as the others, some with all labels ignored: a sharded model takes part in each
        forward pass of each rank.
        """
        starts = list(range(0, count, batch_size))
        for turn in range(0, len(starts), num_processes):
            mine = turn + rank
            start = starts[mine] if mine < len(starts) else 0
            input_ids, labels = self.sequences(start, min(batch_size, count - start))
            yield input_ids, labels if mine < len(starts) else torch.full_like(labels, IGNORE_INDEX)

    def micro_batches(
        self, position: int, micro_batch: int, accumulation_steps: int, rank: int, num_processes: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the global batch that begins at sequence `position`."""
        for step in range(accumulation_steps):
            yield self.sequences(position + (step * num_processes + rank) * micro_batch, micro_batch)

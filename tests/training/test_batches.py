"""The order of the training data."""

import itertools

import numpy as np
import pytest
import torch

from data_prep.manifest import Manifest
from data_prep.shards import open_shard
from training.batches import Batches, TokenStream

T = 64


def stream(folder, order="shuffled", seed=1, split="train") -> TokenStream:
    return TokenStream(folder, Manifest.read(folder), split, order, seed)


def batches(folder, **options) -> Batches:
    return Batches(stream(folder, **options), T, torch.device("cpu"))


def on_disk(folder, split="train") -> np.ndarray:
    return np.concatenate([open_shard(folder / s.file) for s in Manifest.read(folder).shards if s.split == split])


def test_sequential_is_the_order_of_the_files(data_folder):
    tokens = on_disk(data_folder).astype(np.int64)
    position = 3 * 20_011 // T - 4  # over the end of a shard
    inputs, labels = batches(data_folder, order="sequential").sequences(position, 8)
    expected = tokens[position * T : (position + 8) * T + 1]
    assert inputs.flatten().tolist() == expected[:-1].tolist() and labels.flatten().tolist() == expected[1:].tolist()
    assert inputs.dtype == labels.dtype == torch.int64 and inputs.shape == (8, T)


def test_every_token_once_an_epoch_and_documents_whole(data_folder):
    shuffled = stream(data_folder)
    count = shuffled.tokens_per_epoch
    tokens = on_disk(data_folder)
    eos = shuffled.eos_token_id
    whole = sorted(map(tuple, np.split(tokens, np.flatnonzero(tokens == eos))[1:]))
    for epoch in range(3):
        read = shuffled.read(epoch * count, count)
        assert np.array_equal(np.sort(read), np.sort(tokens))
        assert not np.array_equal(read, tokens)
        # Documents move as wholes; those that a shard's end cuts in two do as two pieces.
        pieces = set(map(tuple, np.split(read, np.flatnonzero(read == eos))))
        assert sum(document in pieces for document in whole) >= len(whole) - 2 * len(shuffled.paths)


def test_every_sequence_once_an_epoch(data_folder):
    """Over three epochs, whose ends lie within sequences."""
    ordered = batches(data_folder)
    # The first sequence that begins in an epoch, for four of them.
    first = [-(-epoch * ordered.stream.tokens_per_epoch // T) for epoch in range(4)]
    assert ordered.stream.tokens_per_epoch % T
    for start, stop in itertools.pairwise(first):
        assert sorted(ordered._index(position) for position in range(start, stop)) == list(range(start, stop))


def test_order_depends_on_seed_and_epoch_alone(data_folder):
    def read(seed, start=0):
        return stream(data_folder, seed=seed).read(start, 50_000)

    epoch = stream(data_folder).tokens_per_epoch
    assert np.array_equal(read(1), read(1))
    assert not np.array_equal(read(1), read(2))
    assert not np.array_equal(read(1), read(1, epoch))
    far = batches(data_folder)
    far.sequences(10_000, 4)
    near = batches(data_folder)
    for position in (0, 500, 3000):
        assert torch.equal(far.sequences(position, 4)[0], near.sequences(position, 4)[0])


def test_a_batch_is_a_sample_of_the_whole_of_a_small_corpus(data_folder):
    ordered = batches(data_folder)
    per_epoch = ordered.stream.tokens_per_epoch // T
    for position in range(0, per_epoch - 64, 64):
        places = sorted(ordered._index(p) for p in range(position, position + 64))
        assert max(np.diff([0, *places, per_epoch])) < per_epoch / 5
    follows = [ordered._index(p + 1) == ordered._index(p) + 1 for p in range(1000)]
    assert sum(follows) < 50


def test_windows_of_a_large_corpus_hold_whole_shards(data_folder, monkeypatch):
    """Permuted within them alone, and still every sequence once."""
    monkeypatch.setattr("training.batches._WINDOW_TOKENS", 45_000)
    ordered = batches(data_folder)
    assert ordered.stream.shards_per_window == 2
    for epoch in (0, 1):
        token = epoch * ordered.stream.tokens_per_epoch
        while token < (epoch + 1) * ordered.stream.tokens_per_epoch:
            window = ordered.stream.window(token)
            assert window.start == token and window.epoch == epoch
            inside = range(-(-window.start // T), -(-window.stop // T))
            assert sorted(map(ordered._index, inside)) == list(inside)
            token = window.stop
        assert token == (epoch + 1) * ordered.stream.tokens_per_epoch


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_ranks_share_a_global_batch(data_folder, processes):
    one = batches(data_folder).sequences(100, 24)[0]
    micro = 24 // processes // 2
    parts = [
        inputs
        for rank in range(processes)
        for inputs, _ in batches(data_folder).micro_batches(100, micro, 2, rank, processes)
    ]
    together = torch.cat(parts)
    assert len(together) == 24
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, one.tolist()))


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_validation_is_shared_out_evenly_and_whole(data_folder, processes, batch_size):
    val = batches(data_folder, split="val", order="sequential")
    shares = [list(val.shared_out(10, batch_size, rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    counted = [
        tuple(row.tolist())
        for share in shares
        for inputs, labels in share
        for row, label in zip(inputs, labels, strict=True)
        if (label != -100).all()
    ]
    assert sorted(counted) == sorted(map(tuple, val.sequences(0, 10)[0].tolist()))
    ignored = [label for share in shares for _, labels in share for label in labels if (label == -100).any()]
    assert all((label == -100).all() for label in ignored)

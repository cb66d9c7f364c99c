"""The order of the training data, and the batches made of it."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from data_prep.sharding.manifest import Manifest, Shard
from data_prep.sharding.order import Mixture, Sequences, TokenStream
from data_prep.sharding.shards import open_shard
from data_prep.sources.source import SourceRecord
from data_prep.tokenization.tokenizer import TokenizerRecord
from modeling import GPTConfig, GPTModel
from training.engine.data import Batches, Prefetcher

T = 64


def stream(folder, order="shuffled", seed=1, split="train") -> TokenStream:
    return TokenStream(folder, Manifest.read(folder), split, order, seed)


def sequences(folder, **options) -> Sequences:
    return Sequences(stream(folder, **options), T)


def batches(folder, **options) -> Batches:
    return Batches(Mixture([sequences(folder, **options)], [1.0]))


def on_disk(folder, split="train") -> np.ndarray:
    return np.concatenate([open_shard(folder / s.file) for s in Manifest.read(folder).shards if s.split == split])


def test_sequential_is_the_order_of_the_files(data_folder):
    tokens = on_disk(data_folder).astype(np.int64)
    position = 3 * 20_011 // T - 4  # over the end of a shard
    batch = batches(data_folder, order="sequential").sequences(position, 8)
    expected = tokens[position * T : (position + 8) * T + 1]
    assert batch["input_ids"].flatten().tolist() == expected[:-1].tolist()
    assert batch["shift_labels"].flatten().tolist() == expected[1:].tolist()
    assert all(tensor.dtype == torch.int64 and tensor.shape == (8, T) for tensor in batch.values()) and len(batch) == 2


def test_every_token_once_an_epoch_and_documents_complete(data_folder):
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
        assert torch.equal(far.sequences(position, 4)["input_ids"], near.sequences(position, 4)["input_ids"])


def test_a_batch_is_a_sample_of_the_whole_of_a_small_corpus(data_folder):
    ordered = sequences(data_folder)
    per_epoch = ordered.stream.tokens_per_epoch // T
    for position in range(0, per_epoch - 64, 64):
        indices = sorted(ordered.index(p) for p in range(position, position + 64))
        assert max(np.diff([0, *indices, per_epoch])) < per_epoch / 5
    follows = [ordered.index(p + 1) == ordered.index(p) + 1 for p in range(1000)]
    assert sum(follows) < 50


def test_windows_of_a_large_corpus_hold_whole_shards(data_folder, monkeypatch):
    """Permuted within them alone, and still every sequence once."""
    monkeypatch.setattr("data_prep.sharding.order._WINDOW_TOKENS", 45_000)
    ordered = sequences(data_folder)
    assert ordered.stream.shards_per_window == 2
    for epoch in (0, 1):
        token = epoch * ordered.stream.tokens_per_epoch
        while token < (epoch + 1) * ordered.stream.tokens_per_epoch:
            window = ordered.stream.window(token)
            assert window.start == token and window.epoch == epoch
            inside = range(-(-window.start // T), -(-window.stop // T))
            assert sorted(map(ordered.index, inside)) == list(inside)
            token = window.stop
        assert token == (epoch + 1) * ordered.stream.tokens_per_epoch


@pytest.fixture(scope="module")
def counted_folder(tmp_path_factory):
    """1,880 sequences in 7 shards, every token another number."""
    folder = tmp_path_factory.mktemp("counted")
    shards = []
    for number, part in enumerate(np.array_split(np.arange(1880 * T, dtype=np.uint32), 7)):
        np.save(folder / f"{number}.npy", part)
        shards.append(Shard(f"{number}.npy", "train", len(part), 0, f"{number:064}"))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    np.save(folder / "val.npy", np.full(T + 1, 1880 * T, dtype=np.uint32))
    shards.insert(0, Shard("val.npy", "val", T + 1, T + 1, f"{7:064}"))
    tokenizer = TokenizerRecord("counted", 1880 * T + 1, 1880 * T, hashlib.sha256(b"{}").hexdigest())
    longest = max(shard.tokens for shard in shards)
    Manifest(SourceRecord("registered"), tokenizer, "npy", "uint32", longest, 1, shards=shards).write(folder)
    return folder


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_every_token_once_an_epoch_for_any_processes_and_through_a_resume(counted_folder, processes, order):
    """As the processes of a run see it: three epochs in steps of 24 sequences, which the epochs' ends fall into. After
    100 steps all is made anew, from the position alone, for another number of processes."""
    steps = []
    for step in range(3 * 1880 // 24):
        if step in (0, 100):
            processes = processes if step == 0 else processes % 4 + 1
            loaders = [batches(counted_folder, order=order) for _ in range(processes)]
        shares = [
            loader.micro_batches(24 * step, 24 * step + 24, 2, rank, processes) for rank, loader in enumerate(loaders)
        ]
        assert all(len(share) == 12 // processes for share in shares)
        steps.append(torch.cat([batch["input_ids"] for share in shares for batch in share]).flatten())
    read = torch.cat(steps).numpy()
    assert np.array_equal(np.bincount(read), np.full(1880 * T, 3))
    whole = 78 * 24 * T  # the steps that lie within the first epoch, and those within the last
    assert len(np.unique(read[:whole])) == whole and len(np.unique(read[-whole:])) == whole


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_validation_is_divided_evenly_over_ranks(data_folder, processes, batch_size):
    val = batches(data_folder, split="val", order="sequential")
    shares = [list(val.for_rank(10, batch_size, rank, processes)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    counted = [
        tuple(row.tolist())
        for share in shares
        for batch in share
        for row, label in zip(batch["input_ids"], batch["shift_labels"], strict=True)
        if (label != -100).all()
    ]
    assert sorted(counted) == sorted(map(tuple, val.sequences(0, 10)["input_ids"].tolist()))
    ignored = [label for share in shares for batch in share for label in batch["shift_labels"] if (label == -100).any()]
    assert all((label == -100).all() for label in ignored)
    assert all((batch["input_ids"] >= 0).all() for share in shares for batch in share)


def test_a_mixture_keeps_its_shares_and_each_sources_order(data_folder, other_data):
    sources = [sequences(data_folder), sequences(other_data), sequences(data_folder, seed=2)]
    weights = [60, 22, 18]
    mixture = Mixture(sources, weights)
    read = [mixture.read(position) for position in range(3000)]
    numbers = [0, 0, 0]
    alone = {i: {tuple(sources[i].read(n)): n for n in range(2000)} for i in range(3)}
    for position, row in enumerate(read):
        assert mixture.consumed(position) == numbers
        shares = np.array(numbers) - position * np.array(weights) / 100
        assert np.abs(shares).max() < 2, "no source runs ahead of its share"
        # It is the next sequence of one of the sources.
        candidates = [i for i in range(3) if np.array_equal(sources[i].read(numbers[i]), row)]
        after = mixture.consumed(position + 1)
        chosen = [i for i in range(3) if after[i] == numbers[i] + 1]
        assert len(chosen) == 1 and chosen[0] in candidates and sum(after) == position + 1
        numbers = after
    assert len(alone[1]) < 2000, "the small source has begun further epochs"


def test_a_mixture_is_a_function_of_the_position_alone(data_folder, other_data):
    def mixture():
        return Mixture([sequences(data_folder), sequences(other_data)], [0.7, 0.3])

    one = mixture()
    for position in (50_000, 7, 1023, 1024, 1025):
        assert np.array_equal(one.read(position), mixture().read(position))
        assert one.consumed(position) == mixture().consumed(position)
    alone = sequences(data_folder)  # a single source is itself
    assert all(np.array_equal(Mixture([alone], [3.0]).read(p), alone.read(p)) for p in (0, 1000, 10_000))


def test_document_masks_give_the_logits_of_each_document_alone(data_folder):
    """Against a model called on the documents one by one."""
    manifest = Manifest.read(data_folder)
    eos = manifest.tokenizer.eos_token_id
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=601, n_embd=32, n_layer=2, n_head=4, n_positions=T)).eval()
    tokens = np.array(([eos, 5, 6, 7] * 3 + [eos] + [9] * 20 + [eos, 8]) * 3, dtype=np.uint16)[:T]
    packed = torch.from_numpy(tokens.astype(np.int64))[None].repeat(2, 1)
    packed[1, :30] = 11  # the rest of a document that began before

    class Fixed:
        def read(self, position):
            return np.append(packed[position].numpy(), 1)

    batch = Batches(Fixed(), document_start=eos).sequences(0, 2)
    with torch.no_grad():
        for attention in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
            logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            whole = model(batch["input_ids"]).logits
            for row in range(2):
                starts = sorted({0, *torch.nonzero(packed[row] == eos).flatten().tolist()})
                assert len(starts) > 3
                for start, stop in itertools.pairwise([*starts, T]):
                    alone = model(packed[row : row + 1, start:stop]).logits[0]
                    torch.testing.assert_close(logits[row, start:stop], alone, atol=1e-5, rtol=1e-5)
                assert not torch.allclose(logits[row], whole[row], atol=1e-3)


@pytest.mark.parametrize(("device", "chosen"), [("cuda", 3), ("cuda:1", 1)])
def test_prefetcher_accepts_a_cuda_device_without_index(monkeypatch, device, chosen):
    """Which is what Accelerate gives a process that is alone, and torch does not take everywhere."""
    asked = []
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch._C._cuda_setDevice", asked.append, raising=False)  # below torch's own check
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    prefetcher = Prefetcher(lambda position: [{"input_ids": torch.tensor([position])}], torch.device(device))
    assert prefetcher.take(7, 8)[0]["input_ids"] == 7
    prefetcher.close()
    assert asked == [chosen]


def test_batches_are_made_ahead_in_order_and_errors_arrive(data_folder):
    made = []

    def make(position):
        made.append(position)
        if position == 30:
            raise ValueError("broken shard")
        return [batches(data_folder).sequences(position, 2)]

    ahead = Prefetcher(make, torch.device("cpu"))
    for position in (0, 10, 20):
        (batch,) = ahead.take(position, position + 10)
        assert torch.equal(batch["input_ids"], batches(data_folder).sequences(position, 2)["input_ids"])
    with pytest.raises(ValueError, match="broken shard"):
        ahead.take(30, 40)
    ahead.take(500, 510)  # not what was made ahead
    ahead.close()
    assert made[:4] == [0, 10, 20, 30] and 500 in made and len(made) == len(set(made))

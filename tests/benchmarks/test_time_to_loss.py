"""`python -m benchmarks.time_to_loss`: the held-out text, and what is computed on it."""

import json
import math

import pytest
import torch

from benchmarks.other_trainers import held_out_bits, tokens_of
from benchmarks.time_to_loss import Curve, measure, prepare, table
from data_prep.common.command_line import UserError
from data_prep.sharding.manifest import Manifest
from data_prep.tokenization.tokenizer import load_tokenizer

TEXT = "".join(f"Line {n} of a text, with an ä and a 日 in it.\n" for n in range(2000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare(TEXT, 300, folder)
    return folder


def test_nothing_of_the_held_out_text_is_trained_on(folder):
    train, held_out = ((folder / name).read_text(encoding="utf-8") for name in ("train.txt", "held_out.txt"))
    assert train + held_out == TEXT and 0.09 < len(held_out) / len(TEXT) < 0.11
    assert Manifest.read(folder).problems(folder) == []
    tokenizer = load_tokenizer(folder / "tokenizer")
    for split, text in (("val", held_out), ("train", train)):
        ids = tokens_of(folder, split)
        assert tokenizer.encoding.decode([i for i in ids.tolist() if i != tokenizer.eos_token_id]) == text
    assert json.loads((folder / "text.json").read_text())["held_out_bytes"] == len(held_out.encode())


def test_bits_per_byte_of_a_uniform_model(folder):
    """log2 of the vocabulary for each token."""
    tokens, size = tokens_of(folder, "val"), (folder / "held_out.txt").stat().st_size
    bits = held_out_bits(lambda x, y: torch.tensor(math.log(300)), tokens, 16, size)
    assert bits == pytest.approx(math.log2(300) * (len(tokens) - 1) / size)


def test_time_to_a_loss():
    ours = [Curve([1.0, 2.0, 4.0], [3.0, 2.5, 2.0]), Curve([2.0, 3.0, 4.0], [3.0, 2.5, 2.0])]
    other = [Curve([5.0, 10.0], [3.0, 2.5]), Curve([6.0, 12.0], [3.1, 2.5])]
    assert ours[0].time_to(2.5) == 2.0 and ours[0].time_to(1.9) is None
    text = table({"gpt-accelerate": ours, "other": other}, {"gpt-accelerate": None, "other": 1e-3})
    assert "4.50 (4.00 to 5.00)" in text.splitlines()[-1]  # 10 s against 2 s, and 12 s against 3 s


def test_a_trainer_that_fails_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has failed: no such thing"):
        measure(["sh", "-c", "echo no such thing; exit 3"], tmp_path)

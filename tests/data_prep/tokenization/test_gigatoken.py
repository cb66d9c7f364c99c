"""gigatoken's ids beside tiktoken's."""

import json
import random
from importlib import metadata

import numpy as np
import pytest

from data_prep.common.command_line import UserError
from data_prep.tokenization.gigatoken import GigatokenTokenizer, with_engine
from data_prep.tokenization.tokenizer import (
    END_OF_TEXT,
    ByteLevelTokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from tests.data_prep.tokenization.test_tokenizer import HARD_TEXTS, random_texts

ALL_CHARACTERS = [number for number in range(0x110000) if not 0xD800 <= number < 0xE000]


@pytest.fixture(scope="module", params=["bpe", "gpt2"])
def reference(request, text_files):
    if request.param == "gpt2":
        return gpt2_tokenizer()
    return train_tokenizer((path.read_text() for path in sorted(text_files.iterdir())), 601)


def hostile(rng: random.Random, count: int) -> list[str]:
    """Texts of characters of all planes, among words."""
    pieces = ["word", " the", "1", "  ", "\n", "!"]
    return [
        "".join(
            chr(rng.choice(ALL_CHARACTERS)) if rng.random() < 0.5 else rng.choice(pieces)
            for _ in range(rng.randrange(1, 12))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [5_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_ids_are_those_of_tiktoken(reference, text_files, count):
    texts = HARD_TEXTS + random_texts(2000) + [path.read_text() for path in text_files.iterdir()]
    texts += hostile(random.Random(1), count)
    assert GigatokenTokenizer(reference).encode(texts).tolist() == reference.encode(texts).tolist()


def split_probe() -> ByteLevelTokenizer:
    """A vocabulary whose ids show how a character is classified: a letter, a digit or a mark merges with its like."""
    firsts = [bytes([byte]) for byte in (*range(128), *range(0xC2, 0xF5))]
    tokens = dict.fromkeys(
        [bytes([byte]) for byte in range(256)] + [kind + b for kind in (b"a", b"1", b"!") for b in firsts]
    )
    return ByteLevelTokenizer("probe", {token: rank for rank, token in enumerate(tokens)}, len(tokens))


@pytest.mark.parametrize(
    "numbers", [ALL_CHARACTERS[::97], pytest.param(ALL_CHARACTERS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_the_characters_that_gigatoken_does_not_know_go_to_tiktoken(numbers):
    probe = split_probe()
    texts = [kind + chr(number) for number in numbers for kind in "a1!"]
    assert GigatokenTokenizer(probe).encode(texts).tolist() == probe.encode(texts).tolist()


def test_documents_are_told_apart_by_their_ends_of_text(reference):
    """Also where the text has the end of text's spelling, or all of it goes to tiktoken."""
    texts = [END_OF_TEXT, "a", "a" + END_OF_TEXT + "b", "", "<|endoftext", "\u088f", "|>", "", f"x {END_OF_TEXT}"]
    assert GigatokenTokenizer(reference).encode(texts).tolist() == reference.encode(texts).tolist()
    assert GigatokenTokenizer(reference).encode([]).tolist() == []


def test_documents_that_tiktoken_reads_in_parts(reference):
    """Cut in a word of a million letters, or between words; in each, the first words are long ones too."""
    texts = [
        "na" * 40_000,
        "xé" * 600_000,
        "word " * 250_000,
        "ab" * 300_000 + " end" * 200_000,
        "x" * (1 << 20) + " y",
    ]
    tokenizer = GigatokenTokenizer(reference)
    for text in texts:
        assert np.array_equal(tokenizer.encode([text]), reference.encode([text]))


def test_a_wrong_id_is_noticed(reference):
    """Two words that have changed places, and an end of text that gigatoken does not know."""
    tokenizer = GigatokenTokenizer(reference)
    state = json.loads(tokenizer._json)
    vocab = state["model"]["vocab"]
    first, second = (word for word in vocab if word in ("Ġt", "Ġa"))
    vocab[first], vocab[second] = vocab[second], vocab[first]
    tokenizer._json = json.dumps(state)
    assert tokenizer.encode(["xyz"]).tolist() == reference.encode(["xyz"]).tolist()
    with pytest.raises(
        UserError, match=r"gigatoken .* other ids than tiktoken for the document that begins with ' t a'"
    ):
        for _ in range(2):  # a sample of each call: one document after another
            tokenizer.encode(["xyz", " t a"])
    tokenizer = GigatokenTokenizer(reference)
    state = json.loads(tokenizer._json)
    state["added_tokens"] = []
    tokenizer._json = json.dumps(state)
    with pytest.raises(UserError, match=r"begins with 'xyz'.*: 0 ends of text for 2 documents"):
        tokenizer.encode(["xyz", " t a"])


def test_an_engine_that_cannot_be_used_is_said(reference, tmp_path, monkeypatch, capsys):
    assert with_engine(reference, "tiktoken") is reference
    assert isinstance(with_engine(reference, "auto"), GigatokenTokenizer) and capsys.readouterr().err == ""
    monkeypatch.setattr(metadata, "version", lambda name: "0.99.1")
    assert with_engine(reference, "auto") is reference
    assert "gigatoken 0.99.1 has not been tested, 0.10.0 has" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"gigatoken 0\.99\.1 has not been tested, .* or give --engine tiktoken"):
        with_engine(reference, "gigatoken")

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert with_engine(reference, "auto") is reference and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="gigatoken is not installed; install it with pip install"):
        with_engine(reference, "gigatoken")


def test_other_tokenizers_run_as_before(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "<e>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>").save_pretrained(tmp_path)
    words = load_tokenizer(tmp_path)
    assert with_engine(words, "auto") is words
    with pytest.raises(UserError, match="gigatoken runs byte-level BPE as GPT-2's only"):
        with_engine(words, "gigatoken")

"""gigatoken's ids beside tiktoken's."""

import random

import pytest

from data_prep.tokenization.gigatoken import GigatokenTokenizer
from data_prep.tokenization.tokenizer import ByteLevelTokenizer, gpt2_tokenizer, train_tokenizer
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

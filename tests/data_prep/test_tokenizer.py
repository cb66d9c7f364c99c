"""Token ids against those of `AutoTokenizer` and of GPT-2's published vocabulary."""

import random

import pytest
from transformers import AutoTokenizer

from data_prep.cli import UserError
from data_prep.tokenizer import END_OF_TEXT, gpt2_tokenizer, train_tokenizer

HARD_TEXTS = [
    "",
    " ",
    "    \n\n\t  x  \n",
    "a" * 300 + " " * 301 + "\n" * 50,
    "don't you'll we've I'm it's he'd THEY'RE",
    "naïve café ÅÄÖ — “quotes” … €1,234.56",
    "日本語 中文 한국어 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇸🇪 \U0001f9ff",
    "\x00\x01\x7f\x80\xa0\xad\u200b\u2028\ufeff\ufffd",
    f"a literal {END_OF_TEXT} and <|im_start|> <|endoftext|",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ==== \r\n",
    "e\u0301 vs \u00e9; \u1e9b\u0323",
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabet = [*"etaoin shrdlu  \n\n\t==--##__..0019'", "  ", "    ", "é", "日", "🙂", "the", "self"]
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 80))) for _ in range(count)]


@pytest.fixture(scope="module", params=["bpe", "gpt2"])
def tokenizers(request, tmp_path_factory, text_files):
    if request.param == "gpt2":
        request.getfixturevalue("shared")
        ours = gpt2_tokenizer()
    else:
        ours = train_tokenizer((path.read_text() for path in sorted(text_files.iterdir())), 601)
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    ours.save(folder)
    return ours, AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_autotokenizer(tokenizers, text_files):
    ours, auto = tokenizers
    texts = HARD_TEXTS + random_texts(2000) + [path.read_text() for path in text_files.iterdir()]
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert ids[0] == ours.eos_token_id
        assert ids[1:].tolist() == auto(text, split_special_tokens=True, verbose=False)["input_ids"], repr(text[:80])
        assert ours.eos_token_id not in ids[1:]
        assert auto.decode(ids[1:]) == text


def test_the_end_of_text_is_the_last_id(tokenizers):
    ours, auto = tokenizers
    assert ours.eos_token_id == auto.eos_token_id == auto.bos_token_id == len(auto) - 1 == ours.vocab_size - 1
    assert auto(END_OF_TEXT)["input_ids"] == [ours.eos_token_id]


def test_gpt2_is_gpt2(shared):
    """Ids of the released encoder, as anyone can look them up in its encoder.json."""
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (50257, 50256)
    assert next(tokenizer.encode(["Hello, I'm a language model,"])).tolist() == [
        50256, 15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip


def test_training_is_deterministic(text_files):
    texts = [path.read_text() for path in sorted(text_files.iterdir())]
    first, second = (train_tokenizer(texts, 500).encoding._mergeable_ranks for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(256, "at least 257"), (100_000, "the corpus yields only .* tokens")]
)
def test_a_vocabulary_that_cannot_be_had_is_refused(vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(["a few words only"], vocab_size)

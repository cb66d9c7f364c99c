"""Token ids against those of `AutoTokenizer` and of GPT-2's published vocabulary."""

import itertools
import json
import random

import pytest
from transformers import AutoTokenizer

from data_prep.common.command_line import UserError
from data_prep.prepare import Recipe, prepare
from data_prep.sources.source import Source
from data_prep.tokenization.byte_level import bytes_of_tokens, chunks
from data_prep.tokenization.tokenizer import (
    END_OF_TEXT,
    ByteLevelTokenizer,
    HuggingFaceTokenizer,
    encode_document,
    gpt2_tokenizer,
    load_tokenizer,
    train_tokenizer,
)

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
        ours = gpt2_tokenizer()
    else:
        ours = train_tokenizer((path.read_text() for path in sorted(text_files.iterdir())), 601)
    folder = tmp_path_factory.mktemp("tokenizer") / "saved"
    ours.save(folder)
    return ours, AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_autotokenizer(tokenizers, text_files):
    ours, auto = tokenizers
    texts = HARD_TEXTS + random_texts(2000) + [path.read_text() for path in text_files.iterdir()]
    for text in texts:
        ids = ours.encode([text])
        assert ids[0] == ours.eos_token_id
        assert ids[1:].tolist() == auto(text, split_special_tokens=True, verbose=False)["input_ids"], repr(text[:80])
        assert ours.eos_token_id not in ids[1:]
        assert auto.decode(ids[1:]) == text
    assert ours.encode(texts).tolist() == [number for text in texts for number in ours.encode([text])]


def test_a_saved_tokenizer_is_run_by_tiktoken_again(tokenizers, tmp_path, text_files):
    ours, _ = tokenizers
    first = ours.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    assert isinstance(again, ByteLevelTokenizer) and again.ranks == ours.ranks
    assert again.save(tmp_path / "b") == first


def test_bytes_of_tokens_add_up_to_the_text(tokenizers):
    ours, auto = tokenizers
    sizes = bytes_of_tokens(auto)
    for text in HARD_TEXTS + random_texts(200):
        assert sizes[ours.encode([text])].sum() == len(text.encode())


def hard_characters(rng, count) -> str:
    return "".join(rng.choices("ab1'!é日🙂\xa0\u2028\x1c \n\t", weights=[8] * 8 + [1, 1, 1, 4, 2, 1], k=count))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 5000])
def test_chunks_have_the_ids_of_the_whole(tokenizers, size):
    """Cuts wherever that is allowed, in text full of positions that must not be cut."""
    ours, _ = tokenizers
    rng = random.Random(size)
    cut = 0
    for text in [hard_characters(rng, 300) for _ in range(100)] + [hard_characters(rng, 30_000)]:
        pieces = list(chunks(text, size))
        assert "".join(pieces) == text and all(0 < len(piece) <= size for piece in pieces)
        allowed = {i for i in range(1, len(text)) if text[i] in " \n" and not text[i - 1].isspace()}
        cuts = list(itertools.accumulate(map(len, pieces[:-1]), initial=0))
        forced = [
            stop for start, stop in itertools.pairwise(cuts) if not allowed & {*range(start + 1, start + size + 1)}
        ]
        assert {*cuts[1:]} - {*forced} <= allowed
        if len(pieces) > 1 and not forced:
            cut += 1
            ids = [number for piece in pieces for number in ours.encode([piece])[1:]]
            assert ids == ours.encode([text])[1:].tolist()
    assert cut or size < 50


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "7", "é", "🙂", "ab ", "=-", "\t\n"])
def test_degenerate_text_is_encoded_whole(tokenizers, unit):
    """Two million characters of one kind, in which no word ends: in seconds, and nothing is lost."""
    ours, auto = tokenizers
    text = unit * (2_000_000 // len(unit))
    ids = ours.encode([text])
    assert bytes_of_tokens(auto)[ids].sum() == len(text.encode()) and ids[0] == ours.eos_token_id
    assert len(ids) < 4 * len(text) + 2


KINDS = ["llama3", "unigram", "several_specials", "prefix_space", "wordpiece", "end_of_word", "dummy_prefix", "nfc"]


@pytest.fixture(scope="module")
def other_kinds(tmp_path_factory):
    """Tokenizers that are not GPT-2's: another split, digits alone, spaces as U+2581, words looked up, text changed."""
    import tokenizers as library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [*random_texts(500), *HARD_TEXTS]
    folder = tmp_path_factory.mktemp("kinds")
    with_unknown = ["</s>", "<unk>"]
    for kind in KINDS:
        if kind == "wordpiece":
            backend = library.Tokenizer(models.WordPiece(unk_token="<unk>"))
            backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=with_unknown)
        elif kind == "end_of_word":
            backend = library.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
            backend.pre_tokenizer = pre_tokenizers.Whitespace()
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=with_unknown, end_of_word_suffix="</w>")
        elif kind == "dummy_prefix":
            backend = library.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            fallback = [f"<0x{byte:02X}>" for byte in range(256)]
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[*with_unknown, *fallback], limit_alphabet=50)
        elif kind == "unigram":
            backend = library.Tokenizer(models.Unigram())
            backend.normalizer = normalizers.NFKC()
            backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
        else:
            backend = library.Tokenizer(models.BPE())
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix_space")
            backend.normalizer = normalizers.NFC() if kind == "nfc" else None
            if kind == "llama3":
                digits = pre_tokenizers.Digits(individual_digits=True)
                backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
            specials = ["</s>", "<pad>", "<|im_start|>"] if kind == "several_specials" else ["</s>"]
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
        backend.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_any_tokenizer_has_the_ids_of_autotokenizer(other_kinds, kind, tmp_path):
    ours, auto = load_tokenizer(other_kinds / kind), AutoTokenizer.from_pretrained(other_kinds / kind)
    assert isinstance(ours, HuggingFaceTokenizer) and ours.vocab_size == len(auto)
    looks_special = "a </s> b <|im_start|> </s></s>"
    assert ours.eos_token_id not in ours.encode([looks_special])[1:]
    assert ours.eos_token_id not in ours.encode(["full width \uff1c/s\uff1e, which NFKC makes <\uff0fs>"])[1:]
    if kind == "unigram":  # to which the special tokens' spelling is a word like any other
        assert ours.encode([looks_special])[1:].tolist() != ours.encode(["a  b <|im_start|> "])[1:].tolist()
        looks_special = "nothing special"
    for text in [*HARD_TEXTS, looks_special, *random_texts(500)]:
        expected = auto(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = ours.encode([text]).tolist()
        assert ids == [auto.eos_token_id, *expected] and auto.eos_token_id not in ids[1:], repr(text)
    text = f"full width \uff1c/s\uff1e, spelled </s>, and more {looks_special}"
    assert encode_document(auto, text) == ours.encode([text]).tolist()
    ours.save(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == auto.get_vocab()


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_has_the_bytes_of_the_text(other_kinds, kind, tmp_path):
    """Validation ends with a document, so nothing is dropped; the shards of training cut theirs anywhere."""
    texts = [text for text in [*HARD_TEXTS, "a </s> b"] if text.strip()] + random_texts(300)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer, folder = load_tokenizer(other_kinds / kind), tmp_path / "data"
    shard_tokens = len(tokenizer.encode(texts[:20]))
    recipe = Recipe(Source(str(tmp_path)), tokenizer=str(other_kinds / kind), shard_tokens=shard_tokens)
    manifest = prepare(recipe, folder)
    assert manifest.dropped_tokens == 0 and len(manifest.shards) > 3
    assert manifest.text_bytes("val") == len("".join(texts[:20]).encode())
    half = len(tokenizer.encode(texts[:10]))
    assert manifest.val_text_bytes_before(half) == pytest.approx(len("".join(texts[:10]).encode()), abs=20)
    assert manifest.text_bytes("val", "train") == len("".join(t for t in texts if not t.isspace()).encode())
    # The tokens tell it just where nothing is added, removed or changed.
    auto = AutoTokenizer.from_pretrained(other_kinds / kind)
    ids = [number for text in texts for number in tokenizer.encode([text])]
    sizes = bytes_of_tokens(auto)
    assert (sizes is not None) == (kind in ("llama3", "several_specials"))
    assert sizes is None or sizes[ids].sum() == len("".join(texts).encode())


def test_added_tokens_count_as_the_text_that_they_are(other_kinds):
    auto = AutoTokenizer.from_pretrained(other_kinds / "llama3")
    auto.add_tokens(["  ", "über"])
    text = "a  b über  c"
    ids = auto(text)["input_ids"]
    assert len(auto) - 1 in ids and bytes_of_tokens(auto)[ids].sum() == len(text.encode())


def test_tokenizers_that_cannot_be_used_are_refused(other_kinds, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(other_kinds / "llama3", tmp_path / "no_end")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=r"tokenizer '.*nothing'"):
        load_tokenizer(tmp_path / "nothing")


def test_the_end_of_text_is_the_last_id(tokenizers):
    ours, auto = tokenizers
    assert ours.eos_token_id == auto.eos_token_id == auto.bos_token_id == len(auto) - 1 == ours.vocab_size - 1
    assert auto(END_OF_TEXT)["input_ids"] == [ours.eos_token_id]


def test_gpt2_is_gpt2():
    """Ids of the released encoder, as anyone can look them up in its encoder.json."""
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (50257, 50256)
    assert tokenizer.encode(["Hello, I'm a language model,"]).tolist() == [
        50256, 15496, 11, 314, 1101, 257, 3303, 2746, 11,
    ]  # fmt: skip


def test_training_is_deterministic(text_files):
    texts = [path.read_text() for path in sorted(text_files.iterdir())]
    first, second = (train_tokenizer(texts, 500).ranks for _ in range(2))
    assert first == second


@pytest.mark.parametrize("alphabet", ["ACGT", "0123456789", "天地玄黄宇宙洪荒", "+-*/_", " \n\t", "\u0301\u0316"])
def test_training_cuts_words_that_are_none(alphabet):
    """A word of half a megabyte of letters, digits, marks or spaces took hours."""
    word = "".join(random.Random(0).choices(alphabet, k=500_000))
    assert train_tokenizer([f"before {word} after"], 280).vocab_size == 280


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(256, "at least 257"), (100_000, "the corpus yields only .* tokens")]
)
def test_a_vocabulary_that_cannot_be_had_is_refused(vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(["a few words only"], vocab_size)

"""Data folders: their shards, their manifest, and what is refused."""

import dataclasses
import hashlib
import json
import os
import sys

import numpy as np
import pytest

from data_prep.cli import UserError
from data_prep.manifest import Manifest
from data_prep.prepare import Recipe, prepare
from data_prep.shards import open_shard, write_shards
from data_prep.sources import Source

EOS = 9


def documents(lengths) -> list[np.ndarray]:
    """Document i is the end of text and then the number i, over and over."""
    return [np.array([EOS] + [i % 8] * (length - 1), dtype=np.uint32) for i, length in enumerate(lengths)]


def test_shards_are_cut_at_exactly_so_many_tokens(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 40, size=100)
    shards, dropped = write_shards(documents(lengths), tmp_path, "x", 64, "uint16")
    assert [shard.tokens for shard in shards[:-1]] == [64] * (len(shards) - 1) and 0 < shards[-1].tokens <= 64
    assert [shard.split for shard in shards] == ["val"] + ["train"] * (len(shards) - 1)
    assert [shard.file for shard in shards[:2]] == ["x_val_000000.npy", "x_train_000001.npy"]
    assert sum(shard.tokens for shard in shards) + dropped == lengths.sum()

    tokens = [np.load(tmp_path / shard.file) for shard in shards]
    assert all(array.dtype == np.uint16 and array.ndim == 1 for array in tokens)
    assert [shard.documents for shard in shards] == [int((array == EOS).sum()) for array in tokens]
    for shard in shards:
        assert shard.sha256 == hashlib.sha256((tmp_path / shard.file).read_bytes()).hexdigest()
    # Nothing lost and nothing moved, but for the rest of the document that validation ends in.
    whole = np.concatenate(documents(lengths))
    assert np.array_equal(np.concatenate(tokens), np.concatenate([whole[:64], whole[64 + dropped :]]))
    assert tokens[1][0] == EOS


def test_no_document_is_in_validation_and_in_training(tmp_path):
    lengths = [50, 50, 50, 50]
    shards, dropped = write_shards(documents(lengths), tmp_path, "x", 60, "uint16")
    val, *train = (set(np.load(tmp_path / shard.file)) - {EOS} for shard in shards)
    assert val == {0, 1} and set.union(*train) == {2, 3}
    assert dropped == 40


def test_build_nanogpts_loader_reads_them(data_folder):
    """Its loader, restated: shards by name and split, loaded whole, as int32, in the order of their names."""
    manifest = Manifest.read(data_folder)
    for split in ("train", "val"):
        files = sorted(name.name for name in data_folder.iterdir() if split in name.name)
        assert files == [shard.file for shard in manifest.shards if shard.split == split] != []
        for name in files:
            tokens = np.load(data_folder / name).astype(np.int32)
            assert tokens.ndim == 1 and tokens.min() >= 0 and tokens.max() == manifest.tokenizer["eos_token_id"]


def test_the_manifest_says_where_the_data_is_from(data_folder, text_files):
    fields = json.loads((data_folder / "manifest.json").read_text())
    assert fields["format_version"] == 1 and fields["dtype"] == "uint16" and fields["shard_tokens"] == 20_011
    assert fields["source"]["source"] == str(text_files) and fields["cleaning"] == []
    assert fields["tokenizer"]["name"] == "bpe-601" and fields["tokenizer"]["vocab_size"] == 601
    own = hashlib.sha256((data_folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    assert fields["tokenizer"]["sha256"] == own


def test_preparing_again_changes_nothing_and_gives_the_same(data_folder, text_files, tmp_path):
    recipe = Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=601, shard_tokens=20_011)
    before = {path: path.stat().st_mtime_ns for path in data_folder.rglob("*")}
    manifest = prepare(recipe, data_folder)
    assert before == {path: path.stat().st_mtime_ns for path in data_folder.rglob("*")}
    again = prepare(recipe, tmp_path / "small")
    assert again == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [({"vocab_size": 700}, "tokenizer='bpe-601' .asked for: 'bpe-700'"), ({"shard_tokens": 5}, "shard_tokens=20011")],
)
def test_another_recipe_for_the_same_folder_is_refused(data_folder, text_files, change, message):
    recipe = Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=601, shard_tokens=20_011)
    with pytest.raises(UserError, match=message):
        prepare(dataclasses.replace(recipe, **change), data_folder)


def test_uint32_where_the_vocabulary_needs_it(tmp_path):
    big = [np.array([EOS, 65_535, 65_536, 70_000], dtype=np.uint32)] * 4
    with pytest.raises(UserError, match="70000 does not fit into uint16"):
        write_shards(big, tmp_path, "x", 8, "uint16")
    shards, _ = write_shards(big, tmp_path, "y", 8, "uint32")
    assert open_shard(tmp_path / shards[0].file)[3] == 70_000


def test_validation_of_the_builtin_corpus_is_drawn_from_the_whole_of_it(tmp_path):
    texts = list(Source("builtin").documents())
    assert len(texts) == len(set(texts)) > 100
    val = texts[: len(texts) // 20]
    alphabetical = sorted(texts)
    places = sorted(alphabetical.index(text) for text in val)
    gaps = np.diff([0, *places, len(texts)])
    assert gaps.max() < len(texts) / 4


def bin_file(path, tokens, magic=20240520, version=1, count=None):
    """A shard as llm.c writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=np.uint16).tobytes())
    return path


def test_bin_shards_are_read(tmp_path):
    assert open_shard(bin_file(tmp_path / "a.bin", [50256, 1, 65535])).tolist() == [50256, 1, 65535]


@pytest.mark.parametrize("wrong", [{"magic": 1}, {"version": 2}, {"count": 4}])
def test_damaged_bin_shards_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=r"a\.bin: not a readable shard"):
        open_shard(bin_file(tmp_path / "a.bin", [1, 2, 3], **wrong))


@pytest.fixture
def own_copy(data_folder, tmp_path):
    import shutil

    return shutil.copytree(data_folder, tmp_path / "copy")


def test_damaged_folders_are_refused(own_copy):
    path = own_copy / "manifest.json"
    good = path.read_text()
    shard = own_copy / json.loads(good)["shards"][1]["file"]
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"{shard.name}: not a readable shard"):
        Manifest.read(own_copy)
    np.save(shard, np.load(own_copy / "small_val_000000.npy")[:-1])
    with pytest.raises(UserError, match="20010 tokens of uint16, the manifest says 20011"):
        Manifest.read(own_copy)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        Manifest.read(own_copy)
    shard.write_bytes(whole)
    Manifest.read(own_copy)

    for text, message in (
        (good.replace('"format_version": 1', '"format_version": 2'), "format version 2"),
        (good[:-20], "not a manifest"),
        ("[]", "not a manifest"),
        (good.replace(shard.name, "../" + shard.name), "outside of the folder"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            Manifest.read(own_copy)
    path.write_text(good)
    tokenizer = own_copy / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(UserError, match="not the tokenizer that wrote the shards"):
        Manifest.read(own_copy)
    tokenizer.unlink()
    with pytest.raises(UserError, match="tokenizer: not readable"):
        Manifest.read(own_copy)
    path.unlink()
    with pytest.raises(UserError, match="not a data folder"):
        Manifest.read(own_copy)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"", {}, "yields no text"),
        (b" \n\n \t", {}, "yields no text"),
        (b"some words\n" * 20, {"shard_tokens": 10_000}, "leaves none for training after a validation shard of 10000"),
        (b"some words\n" * 20, {"shard_tokens": 0}, "shard_tokens=0"),
        (b"\xff\xfe", {}, "can't decode byte 0xff"),
        (None, {}, "no such file or folder"),
    ],
)
def test_what_cannot_be_prepared_leaves_nothing(tmp_path, text, options, message, monkeypatch):
    """With a tokenizer of its own text, so that the corpus is what fails."""
    if text is not None:
        (tmp_path / "a.txt").write_bytes(text)
    from data_prep.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words"], 257)
    monkeypatch.setattr("data_prep.prepare.gpt2_tokenizer", lambda: tokenizer)
    with pytest.raises(UserError, match=message):
        prepare(Recipe(Source(str(tmp_path / "a.txt")), **options), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.txt"}


def test_a_vocabulary_too_large_for_the_dtype_is_refused(text_files, tmp_path, monkeypatch):
    import tiktoken

    from data_prep.tokenizer import SPLIT_PATTERN, Tokenizer

    ranks = {bytes([i]): i for i in range(256)} | {b"%05d" % i: i for i in range(256, 70_000)}
    large = Tokenizer(
        "large",
        tiktoken.Encoding(
            "large", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 70_000}
        ),
    )
    monkeypatch.setattr("data_prep.prepare.gpt2_tokenizer", lambda: large)
    with pytest.raises(UserError, match="the tokenizer has 70001 ids, uint16 holds 65536; use dtype uint32"):
        prepare(Recipe(Source(str(text_files)), dtype="uint16"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_commands_say_it_in_one_line(tmp_path):
    """In processes of their own, GPT-2's vocabulary neither cached nor reachable among them."""
    from conftest import run_command

    environment = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    (tmp_path / "a.txt").write_text("some words\n" * 1000)
    for words, message in (
        (["out", "--source", "a.txt"], "error: GPT-2's vocabulary is not in tiktoken's cache (TIKTOKEN_CACHE_DIR: "),
        (["out", "--sourc", "a.txt"], "python -m data_prep.prepare: error: "),
        (["out", "--source", "a.txt", "--tokenizr", "bpe"], "unknown '--tokenizr'; did you mean '--tokenizer'?"),
    ):
        command = [sys.executable, "-m", "data_prep.prepare", *words]
        done = run_command(*command, cwd=tmp_path, expect=2, env=environment)
        assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()

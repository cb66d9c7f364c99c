"""Shard files, and folders that are not what their manifest says."""

import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import run_command
from transformers import AutoTokenizer

from data_prep.common.command_line import UserError
from data_prep.contamination import documents
from data_prep.inspect import measure
from data_prep.register import register
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.order import TokenStream
from data_prep.sharding.shards import ShardFile, open_shard
from data_prep.verify import verify
from eval.loss import read_tokens


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_shards_are_read_as_they_were_written(tmp_path, suffix, dtype):
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, size=1234, dtype=dtype, endpoint=True)
    path = tmp_path / f"a.{suffix}"
    file = ShardFile(path, dtype)
    file.add(tokens[:1000])
    assert not path.exists()
    file.add(tokens[1000:])
    assert file.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_shard(path).dtype == dtype and np.array_equal(open_shard(path), tokens)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix == "npy":
        assert np.array_equal(np.load(path), tokens)


def bin_file(path, tokens, magic=20240520, version=1, count=None):
    """A shard as llm.c writes it."""
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, dtype=np.uint16).tobytes())
    return path


def test_bin_shards_are_llm_cs(tmp_path):
    published = bin_file(tmp_path / "a.bin", [50256, 1, 65535])
    assert open_shard(published).tolist() == [50256, 1, 65535]
    own = ShardFile(tmp_path / "b.bin", "uint16")
    own.add(np.array([50256, 1, 65535], dtype=np.uint16))
    own.finish()
    assert (tmp_path / "b.bin").read_bytes() == published.read_bytes()


@pytest.mark.parametrize("wrong", [{"magic": 1}, {"version": 2}, {"count": 4}, {"count": 2}])
def test_damaged_bin_shards_are_refused(tmp_path, wrong):
    with pytest.raises(UserError, match=r"a\.bin: not a readable shard"):
        open_shard(bin_file(tmp_path / "a.bin", [1, 2, 3], **wrong))


def test_build_nanogpts_loader_reads_them(data_folder):
    """Its loader, restated: shards by name and split, loaded whole, as int32, in the order of their names."""
    manifest = Manifest.read(data_folder)
    for split in ("train", "val"):
        files = sorted(name.name for name in data_folder.iterdir() if split in name.name)
        assert files == [shard.file for shard in manifest.shards if shard.split == split] != []
        for name in files:
            tokens = np.load(data_folder / name).astype(np.int32)
            assert tokens.ndim == 1 and tokens.min() >= 0 and tokens.max() == manifest.tokenizer.eos_token_id


@pytest.fixture
def own_copy(data_folder, tmp_path):
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
        (good.replace('"format_version": 2', '"format_version": 3'), "format_version=3: input should be 2"),
        (good[:-20], "manifest.json: not JSON"),
        ("[]", r"manifest.json: \[\]: input should be an object"),
        (good.replace(shard.name, "../" + shard.name), "is not a plain name"),
        (good.replace('"unfinished": null', '"unfinished": {"file": 1}'), "its preparation has not finished"),
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


def test_verify_finds_what_reading_the_manifest_does_not(own_copy):
    assert list(verify(own_copy)) == []
    shards = Manifest.read(own_copy).shards
    for number, (index, value) in enumerate([(777, 5), (778, 601), (779, 600)], start=1):
        tokens = np.load(own_copy / shards[number].file)
        assert tokens[index] != value
        tokens[index] = value
        np.save(own_copy / shards[number].file, tokens)
    (own_copy / "stray.npy").write_bytes(b"")
    Manifest.read(own_copy)
    found = [problem.removeprefix(f"{own_copy}/") for problem in verify(own_copy)]
    hashes = [f"{shard.file}: its sha256 is not the one in the manifest" for shard in shards[1:4]]
    assert found == [
        hashes[0],
        hashes[1],
        f"{shards[2].file}: token id 601, the vocabulary ends at 600",
        hashes[2],
        f"{shards[3].file}: {shards[3].documents + 1} documents begin in it, the manifest says {shards[3].documents}",
        "stray.npy: not in the manifest",
    ]


def test_commands_show_a_folder(own_copy):
    def command(module, *words, exit_code=0):
        return run_command(
            sys.executable, "-m", f"data_prep.{module}", own_copy, *words, cwd=own_copy, exit_code=exit_code
        )

    manifest = Manifest.read(own_copy)
    total = sum(shard.tokens for shard in manifest.shards)
    assert f"copy is whole: {len(manifest.shards)} shards, {total:,} tokens" in command("verify").stdout
    shown = command("inspect", "--documents", "2").stdout
    assert f"tokens      {total:,} (100.0% of all shown)" in shown and shown.count("--- small_train_") == 2

    # Bytes per token and lengths, from the text that the tokens decode to.
    from transformers import AutoTokenizer

    tokens = np.concatenate([np.load(own_copy / shard.file) for shard in manifest.shards])
    starts = np.flatnonzero(tokens == 600)
    text = AutoTokenizer.from_pretrained(own_copy / "tokenizer").decode(tokens.tolist(), skip_special_tokens=True)
    assert f"fertility   {len(text.encode()) / (total - len(starts)):.3f} bytes per token" in shown
    val_end = manifest.shards[0].tokens
    lengths = np.diff(np.unique([*starts, val_end, total]))
    for line in shown.split("lengths in tokens, documents\n")[1].split("---")[0].strip().splitlines():
        low, _, high, count, *_ = line.replace(",", "").split()
        assert int(count) == ((lengths >= int(low)) & (lengths <= int(high))).sum()

    (own_copy / manifest.shards[2].file).write_bytes(b"x")
    damaged = command("verify", exit_code=2).stderr
    assert "is damaged" in damaged and f"{manifest.shards[2].file}: not a readable shard" in damaged


def test_published_shards_are_used_as_they_are(data_folder, tmp_path):
    """Registers a folder of llm.c's files and nothing else."""
    folder = tmp_path / "retrieval"  # a name with `val` in it, as those of the files
    folder.mkdir()
    manifest = Manifest.read(data_folder)
    for shard in manifest.shards:
        name = shard.file.replace("npy", "bin").replace("small", "medieval")
        bin_file(folder / name, np.load(data_folder / shard.file))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    registered = register(folder, str(data_folder / "tokenizer"))
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
    assert Manifest.read(folder) == registered and list(verify(folder)) == []
    for split in ("train", "val"):
        assert registered.tokens(split) == manifest.tokens(split)
    assert registered.tokenizer.sha256 == manifest.tokenizer.sha256
    with pytest.raises(UserError, match=r"has a manifest\.json already"):
        register(folder)
    assert registered.is_registered and not manifest.is_registered

    # Once more, with the tokenizer beside them: it is taken, and left as it is.
    (folder / "manifest.json").unlink()
    (folder / "tokenizer" / "notes.txt").write_text("mine")
    assert register(folder, "gpt2").tokenizer.sha256 == manifest.tokenizer.sha256
    assert (folder / "tokenizer" / "notes.txt").read_text() == "mine"


def test_hundreds_of_shards_need_few_open_files(data_folder, tmp_path):
    """All that reads shards, in a process that may open 100 files more, on 240 shards; a document crosses those of
    training."""
    resource = pytest.importorskip("resource")
    for number in range(120):
        bin_file(tmp_path / f"x_val_{number:03}.bin", [600, number, 7])
        bin_file(tmp_path / f"x_train_{number:03}.bin", [600 if number == 0 else 1, number, 9])
    tokenizer = AutoTokenizer.from_pretrained(data_folder / "tokenizer")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = set(map(int, os.listdir("/dev/fd")))
    allowed = [number for number in range(1000) if number not in used][100]
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, limits[1]))
    try:
        manifest = register(tmp_path, str(data_folder / "tokenizer"))
        for order in ("shuffled", "sequential"):
            read = TokenStream(tmp_path, manifest, "train", order, 0).read(0, 360)
            assert sorted(read) == sorted([600, *[1] * 119, *range(120), *[9] * 120])
        assert len(list(documents(tmp_path, manifest))) == 121
        assert measure(tmp_path, manifest)[1].sum() == 121
        assert read_tokens(tmp_path, tokenizer)[0].tolist()[-3:] == [600, 119, 7]
        assert list(verify(tmp_path)) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_cannot_be_registered_is_refused(data_folder, tmp_path):
    tokenizer = str(data_folder / "tokenizer")
    bin_file(tmp_path / "x_val_0.bin", [600, 1])
    with pytest.raises(UserError, match=r"no .npy or .bin files with 'val' and with 'train'"):
        register(tmp_path, tokenizer)
    bin_file(tmp_path / "x_train_1.bin", [600, 601])
    with pytest.raises(UserError, match=r"its largest id is 601, and those of tokenizer .* end at 600"):
        register(tmp_path, tokenizer)
    for name in ("x_val_0.bin", "x_train_1.bin"):
        bin_file(tmp_path / name, [3, 7])
    with pytest.raises(UserError, match="none of the shards has id 600 in it, with which tokenizer"):
        register(tmp_path, tokenizer)
    np.save(tmp_path / "x_train_2.npy", np.array([600, 7], dtype=np.uint16))
    with pytest.raises(UserError, match="shards of several kinds"):
        register(tmp_path, tokenizer)
    np.save(tmp_path / "x_test_2.npy", np.array([600, 7], dtype=np.uint16))
    with pytest.raises(UserError, match=r"x_test_2\.npy: the name of a shard says either 'val' or 'train'"):
        register(tmp_path, tokenizer)
    assert not (tmp_path / "manifest.json").exists()

"""Folders, sources and manifests that are not as we would have written them."""

import base64
import contextlib
import http.server
import json
import os
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_MODEL, run_command
from forks import begin, begin_command

from data_prep.common.command_line import UserError, redact
from data_prep.prepare import Recipe, prepare
from data_prep.register import register
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.shards import open_shard
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source
from data_prep.verify import verify
from training.engine.data import load_data
from training.settings.reading import parse_config


@pytest.fixture
def copy(data_folder, tmp_path) -> Path:
    return shutil.copytree(data_folder, tmp_path / data_folder.name)


def edit(folder: Path, change) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def list_validation_as_training(manifest: dict) -> None:
    manifest["shards"][0]["split"] = "train"
    manifest["val_shards"] = 1


CONTRADICTIONS = {
    "a validation shard as training": (list_validation_as_training, "is listed as split 'train'"),
    "a shard twice": (lambda m: m["shards"].append(m["shards"][-1]), "is listed twice"),
    "another split": (lambda m: m["shards"][0].update(split="test"), "split='test'"),
    "no split": (lambda m: m["shards"][0].pop("split"), "shards.0.split is missing"),
    "vocabulary NaN": (lambda m: m["tokenizer"].update(vocab_size=float("nan")), "tokenizer.vocab_size=nan"),
    "vocabulary 0": (lambda m: m["tokenizer"].update(vocab_size=0), "tokenizer.vocab_size=0"),
    "end of text beyond": (lambda m: m["tokenizer"].update(eos_token_id=601), "eos_token_id=601"),
    "negative tokens": (lambda m: m["shards"][1].update(tokens=-1), "shards.1.tokens=-1"),
    "tokens as text": (lambda m: m["shards"][1].update(tokens="20011"), "shards.1.tokens='20011'"),
    "a longer shard": (lambda m: m["shards"][1].update(tokens=10**9), "has 1000000000 tokens"),
    "validation in the middle": (lambda m: m["shards"].append(m["shards"].pop(0)), "are not the first val_shards=1"),
    "more validation": (lambda m: m.update(val_shards=3), "1 shards of validation, val_shards=3"),
    "the same in both": (
        lambda m: (m["source"].update(source="registered"), m["shards"][1].update(sha256=m["shards"][0]["sha256"])),
        "is the same as",
    ),
    "another type": (lambda m: m.update(dtype="float32"), "dtype='float32'"),
    "a path": (lambda m: m["shards"][1].update(file="/etc/passwd"), "is not a plain name"),
    "a key of the future": (lambda m: m.update(compression="zstd"), "unknown 'compression'"),
    "a hash that is none": (lambda m: m["shards"][1].update(sha256="x"), "shards.1.sha256='x'"),
    "no source": (lambda m: m.update(source=None), "source=None"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused_by_verify_and_by_training(copy, what):
    change, message = CONTRADICTIONS[what]
    edit(copy, change)
    with pytest.raises(UserError, match=r"manifest\.json: ") as caught:
        list(verify(copy))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"manifest\.json: "):
        load_data(parse_config(["--data", str(copy), *TINY_MODEL]))


def test_another_end_of_text_than_the_tokenizers_is_refused(copy, tmp_path):
    edit(copy, lambda manifest: manifest["tokenizer"].update(eos_token_id=5))
    assert any("eos_token_id=600, not 5" in problem for problem in verify(copy))
    code, text = begin(["--data", copy, *TINY_MODEL], tmp_path).ended()
    assert code == 2 and "eos_token_id=600, not 5" in text and text.count("\n") == 1, text


def test_the_same_shard_for_training_and_validation_is_not_registered(copy, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(copy / "tokenizer", folder / "tokenizer")
    shard = next(copy.glob("*_train_*.npy"))
    for split in ("val", "train"):
        shutil.copy(shard, folder / f"x_{split}_000000.npy")
    with pytest.raises(UserError, match=r"training shard 'x_train_000000.npy' is the same as 'x_val_000000.npy'"):
        register(folder)
    (folder / "x_val_000000.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"x_val_000000\.npy: not a readable shard"):
        register(folder)


def npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, a=np.arange(5, dtype=np.uint16))


def longer(path: Path) -> None:
    np.save(path, np.arange(5, dtype=np.uint16))
    with open(path, "ab") as file:
        file.write(b"\0\0")


SHARDS = {
    "empty": lambda path: path.write_bytes(b""),
    "npz": npz,
    "trailing bytes": longer,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "text": lambda path: path.write_text("hello" * 100),
    "two dimensions": lambda path: np.save(path, np.zeros((2, 2), dtype=np.uint16)),
    "floats": lambda path: np.save(path, np.zeros(5)),
    "big-endian": lambda path: np.save(path, np.zeros(5, dtype=">u2")),
    "a count that overflows": lambda path: path.write_bytes(
        b"\x93NUMPY\x01\x00v\x00"
        + b"{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,), }".ljust(117)
        + b"\n"
    ),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_what_is_no_shard_is_said_in_one_line(tmp_path, kind):
    SHARDS[kind](tmp_path / "x.npy")
    with pytest.raises(UserError, match=r"x\.npy: not a readable shard"):
        open_shard(tmp_path / "x.npy")


@pytest.mark.parametrize("size", [0, 3, 11, 1023, 1024])
@pytest.mark.parametrize("count", [-1, 0, 7])
def test_headers_of_llm_c_that_are_wrong(tmp_path, size, count):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, count
    (tmp_path / "x.bin").write_bytes(header.tobytes()[:size])
    if (size, count) == (1024, 0):
        assert len(open_shard(tmp_path / "x.bin")) == 0
        return
    with pytest.raises(UserError, match=r"x\.bin: not a readable shard"):
        open_shard(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["proj [1]", "a*b", "what?", "[x]", "{y}"])
def test_a_path_that_looks_like_a_pattern_is_found(tmp_path, name):
    folder = tmp_path / name / "texts"
    folder.mkdir(parents=True)
    (folder / "one [2].txt").write_text("one")
    (folder / "two.txt").write_text("two")
    (tmp_path / "proj 1").mkdir()
    (tmp_path / "proj 1" / "wrong.txt").write_text("wrong")

    def texts(source: Path | str) -> list[str]:
        return list(open_source(Source(str(source))).documents())

    assert texts(folder) == texts(folder / "*.txt") == ["one", "two"]
    assert texts(folder / "one [2].txt") == ["one"] and texts(folder / "t*.txt") == ["two"]
    assert texts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe"])
def test_a_source_that_never_ends_is_refused(tmp_path, kind):
    path = tmp_path / "x.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    for source in (path, tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            open_source(Source(str(source)))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"text": ' * 100_000, "{" * 100_000 + "}" * 100_000])
def test_json_of_any_depth_is_one_line(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        list(open_source(Source(str(tmp_path / "x.jsonl"))).documents())


def test_what_validation_cuts_off_is_said(data_folder, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    words = "some words that are said again and again " * 3
    (texts / "a.jsonl").write_text("".join(json.dumps({"text": words * n}) + "\n" for n in (40, 1, 1, 60, 1, 1)))
    flags = ["data", "--source", texts, "--tokenizer", data_folder / "tokenizer", "--shard_tokens", "200"]
    code, text = begin_command("data_prep.prepare", flags, tmp_path).ended()
    assert code == 0, text
    dropped = Manifest.read(tmp_path / "data").dropped_tokens
    assert code == 0 and dropped > 100
    assert f"dropped {dropped:,} tokens: the rest of the document that validation ends in" in text


def test_preparation_removes_nothing_but_its_own(tmp_path, text_files):
    folder = tmp_path / "data"
    recipe = Recipe(Source(str(text_files)), tokenizer="bpe", vocab_size=400, shard_tokens=30_000)
    prepare(recipe, folder)
    foreign = ["notes.tmp", "data_backup.npy", "data_train_1.npy", "data_train_000001.npy.bak", "other_val_000000.npy"]
    for name in foreign:
        (folder / name).write_bytes(b"precious")
    (folder / "tokenizer" / "notes.txt").write_text("precious")
    edit(folder, lambda manifest: manifest.update(shards=[], unfinished={"file": 0}))  # killed in its first shard
    prepare(recipe, folder)
    assert all((folder / name).read_bytes() == b"precious" for name in foreign)
    assert (folder / "tokenizer" / "notes.txt").read_text() == "precious"


def test_cleaning_removes_nothing_but_its_own(tmp_path, text_files):
    (tmp_path / "clean.yaml").write_text(
        f"sources: {{mine: {text_files}/*.txt}}\noutput: {tmp_path}/out\nsteps: [SymbolLinesFormatter]\n"
    )
    assert begin_command("data_prep.clean", ["clean.yaml"], tmp_path).ended()[0] == 0
    (tmp_path / "out" / "work").mkdir(exist_ok=True)
    (tmp_path / "out" / "work" / "mine.txt").write_text("precious")
    (tmp_path / "out" / "work" / "log").write_text("ours")
    assert begin_command("data_prep.clean", ["clean.yaml"], tmp_path).ended()[0] == 0
    assert [path.name for path in (tmp_path / "out" / "work").iterdir()] == ["mine.txt"]


SECRET = "s3cret-PW"


class Guarded(http.server.SimpleHTTPRequestHandler):
    """Gives files to bob only."""

    def do_GET(self) -> None:
        expected = base64.b64encode(f"bob:{SECRET}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {expected}":
            self.send_error(401)
        else:
            super().do_GET()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@contextlib.contextmanager
def guarded(folder: Path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Guarded, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://bob:{SECRET}@127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.processes
def test_a_password_in_an_address_is_written_nowhere(short_steps, data_folder, text_files, tmp_path):
    """Not printed or written either: in the data folder, the run, its report and its card, and messages."""
    served = tmp_path / "served"
    served.mkdir()
    lines = [json.dumps({"text": path.read_text()}) for path in sorted(text_files.iterdir())]
    (served / "x.jsonl").write_text("\n".join(lines) + "\n")
    with guarded(served) as address:
        flags = ["data", "--source", f"{address}/x.jsonl", "--tokenizer", data_folder / "tokenizer"]
        code, output = begin_command("data_prep.prepare", [*flags, "--shard_tokens", "20000"], tmp_path).ended()
        assert code == 0, output
        code, refused = begin_command("data_prep.prepare", ["other", *map(str, flags[1:3]), "--text_column", "x"],
                                      tmp_path).ended()  # fmt: skip
        assert code == 2 and "error: " in refused
    code, missing = begin_command("data_prep.prepare", ["third", "--source", f"{address}/y.jsonl"], tmp_path).ended()
    assert code == 2
    words = [*short_steps, "--data", "data", "--max_steps", "2", "--run_name", "run"]
    code, trained = begin(words, tmp_path).ended()
    assert code == 0, trained
    from eval.reporting.card import model_card
    from eval.reporting.records import read_run

    (checkpoint,) = (tmp_path / "runs" / "run" / "checkpoints").iterdir()
    card = model_card(read_run(tmp_path / "runs" / "run"), 2, checkpoint, "user/x", "mit", [])
    assert "http://***@127.0.0.1" in card
    assert not [text for text in (output, refused, missing, trained, card) if SECRET in text]
    shutil.rmtree(served)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://bob:PW@host/x", "http://***@host/x"),
        ("see s3://KEY:SEC/RET@bucket", "see s3://KEY:SEC/RET@bucket"),  # a slash ends what can be a name
        ("ftp://bob@host", "ftp://***@host"),
        ("https://host/x?token=abc&a=1", "https://host/x?token=***&a=1"),
        ("https://host/x?X-Amz-Signature=abc", "https://host/x?X-Amz-Signature=***"),
        ("mail bob@host.org", "mail bob@host.org"),
        ("hf://datasets/a/b@main/x", "hf://datasets/a/b@main/x"),
    ],
)
def test_what_is_secret_in_an_address(text, expected):
    assert redact(text) == expected


def test_names_that_are_not_text_are_refused_in_one_line(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("some text")
    done = run_command(sys.executable, "-m", "data_prep.prepare", "data", "--source", name, cwd=tmp_path, exit_code=2,
                       env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert "is not UTF-8 text" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / f"{name}.txt").write_text("some text " * 99)
    recipe = Recipe(Source(str(tmp_path / "texts")), tokenizer="bpe", vocab_size=257, shard_tokens=20)
    assert prepare(recipe, tmp_path / "data").tokens("train")  # it is read


@pytest.mark.processes
def test_a_foreign_report_of_a_cleaning_is_no_report(short_steps, text_files, tmp_path):
    """Beside the source or above it: preparation says so, and what is made of the data works to the end."""
    texts = shutil.copytree(text_files, tmp_path / "project" / "texts")
    for folder in (texts, texts.parent):
        (folder / "config.json").write_text('{"name": "of another program"}')
        (folder / "cleaning.json").write_text('{"cleaned": true}')
    flags = ["data", "--source", texts, "--tokenizer", "bpe", "--vocab_size", "400", "--shard_tokens", "20000"]
    code, text = begin_command("data_prep.prepare", flags, tmp_path).ended()
    assert code == 0 and "not taken for a report of data_prep.clean" in text, text
    words = [*short_steps, "--data", "data", "--max_steps", "1", "--run_name", "run"]
    run = begin(words, tmp_path).finished("run")
    assert (run.folder / "report" / "report.md").exists()

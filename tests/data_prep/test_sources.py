"""Documents from every kind of source, and what a bad one says."""

import gzip
import io
import json
import os
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet
from standin_hub import serve_dataset

from data_prep.cli import UserError
from data_prep.sources import MAX_TEXT_DOCUMENT, Source

TEXTS = ["first\nof two lines", "", "zweiter, ünïcode 🙂", "   ", "third"]
EXPECTED = [TEXTS[0], TEXTS[2], TEXTS[4]]


def write_jsonl(path, lines=None):
    data = "".join(line + "\n" for line in lines or (json.dumps({"text": text, "n": 1}) for text in TEXTS)).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_records(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS}), path)
    else:
        write_jsonl(path)
    assert list(Source(str(path)).documents()) == EXPECTED


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.md").write_text("not a corpus")
    assert list(Source(str(tmp_path)).documents()) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(Source(str(tmp_path / "*.txt")).documents()) == ["a.txt", "b.txt"]
    assert list(Source(str(tmp_path / "**" / "*.txt")).documents()) == ["a.txt", "b.txt", "sub/c.txt"]


def test_another_text_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [json.dumps({"body": "x"})])
    assert list(Source(str(path), text_column="body").documents()) == ["x"]


@pytest.mark.parametrize("line", ["word " * 10 + "\n", "a line\n\n", "x" * 1000])
def test_long_text_files_are_cut_into_documents(tmp_path, line):
    text = line * (3 * MAX_TEXT_DOCUMENT // len(line))
    (tmp_path / "a.txt").write_text(text)
    pieces = list(Source(str(tmp_path / "a.txt")).documents())
    assert "".join(pieces) == text
    assert len(pieces) >= 3 and max(map(len, pieces)) <= MAX_TEXT_DOCUMENT
    if "\n" in line:
        assert all(piece.endswith(line[-2:]) for piece in pieces)


def test_builtin_is_this_pythons_standard_library():
    import json as json_package
    from pathlib import Path

    texts = set(Source("builtin").documents())
    assert Path(json_package.__file__).read_text(encoding="utf-8") in texts
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "good"}\nnot json\n', "line 2: not JSON"),
        (b"[1, 2]\n", "line 1: not a JSON object but list"),
        (b'{"text": "good"}\n{"text": 17}\n', "line 2: field 'text' is not text but int"),
        (b'{"body": "x"}\n', "line 1: no field 'text' among .'body'.; name one with --text_column"),
        (b'{"text": "\xff"}\n', "line 1: not JSON"),
        (b'{"text": "\\ud800"}\n', "line 1: field 'text' is not text .*surrogates not allowed"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(Source(str(tmp_path / "a.jsonl")).documents())


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a parquet file"):
        list(Source(str(path)).documents())
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(UserError, match=r"no column 'text' among .'body'."):
        list(Source(str(path)).documents())
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="row 1: field 'text' is not text but int"):
        list(Source(str(path)).documents())


def test_bad_text_and_missing_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe bad")
    with pytest.raises(UserError, match=r"a\.txt: .*can't decode byte 0xff"):
        list(Source(str(tmp_path / "a.txt")).documents())
    for source, message in (
        (tmp_path / "none.txt", "no such file or folder"),
        (tmp_path / "none*.txt", "no file in it ends in"),
        (tmp_path / "a.csv", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            list(Source(str(source)).documents())
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"a\.csv: not one of the formats"):
        list(Source(str(tmp_path / "a.csv")).documents())


def parquet_bytes(**columns) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def test_hub_data_sets_are_streamed(tmp_path):
    """`datasets` reads them from a stand-in Hub on 127.0.0.1."""
    files = {f"data/train-0000{i}-of-00002.parquet": parquet_bytes(text=[f"{i} {t}" for t in TEXTS]) for i in (0, 1)}
    program = "import json, sys; from data_prep.sources import Source; "
    program += "print(json.dumps([list(Source(name).documents()) for name in sys.argv[1:]]))"
    with serve_dataset("user/corpus", files) as (endpoint, requests):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done, missing = (
            subprocess.run([sys.executable, "-c", program, name], env=environment, capture_output=True, text=True)
            for name in ("user/corpus", "user/none")
        )
    assert json.loads(done.stdout) == [[f"{i} {text}" for i in (0, 1) for text in TEXTS]]
    assert any("resolve" in request and request.endswith(".parquet") for request in requests)
    assert "UserError: source 'user/none' is no local file" in missing.stderr


def test_names_that_may_be_on_the_hub():
    assert Source("user/corpus-1.0").files() == []
    for missing in ("user/corpus.txt", "./user/corpus", "a/b/c", "corpus"):
        with pytest.raises(UserError, match="no such file or folder"):
            Source(missing).files()

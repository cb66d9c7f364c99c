"""Documents from every kind of source, and what a bad one says."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from functools import partial

import huggingface_hub
import pyarrow
import pytest
import zstandard
from conftest import ROOT
from pyarrow import parquet
from standin_hub import Repository, serve, serve_dataset

from data_prep.common.command_line import UserError
from data_prep.common.hub import Hub, limit_waiting, local_folder
from data_prep.sources.fields import Condition
from data_prep.sources.formats import MAX_TEXT_DOCUMENT
from data_prep.sources.opening import open_source
from data_prep.sources.source import Position, Source
from data_prep.tokenization.tokenizer import hf_tokenizer
from eval.common.models import from_pretrained, read_config
from eval.hellaswag import read_items

TEXTS = ["first\nof two lines", "", "zweiter, ünïcode 🙂", "   ", "third"]
EXPECTED = [TEXTS[0], TEXTS[2], TEXTS[4]]


def documents(source, **options) -> list[str]:
    return list(open_source(Source(str(source), **options)).documents())


def write_jsonl(path, lines=None):
    data = "".join(line + "\n" for line in lines or (json.dumps({"text": text, "n": 1}) for text in TEXTS)).encode()
    path.write_bytes(PACKERS.get(path.suffix.lower(), bytes)(data))
    return path


def zstd_with_the_largest_window(data: bytes) -> bytes:
    """As `zstd --long=31` writes it."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(data) + stream.flush()


PACKERS = {
    ".gz": lambda data: gzip.compress(data) + bytes(512),  # as a tape is padded
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": zstd_with_the_largest_window,
}


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "A.JSONL", "a.json.gz", "a.jsonl.gz", "a.jsonl.zst", "a.jsonl.zstd", "a.jsonl.bz2", "a.Jsonl.XZ"),
        *("a.parquet", "A.PARQUET"),
    ],
)
def test_records(tmp_path, name):
    path = tmp_path / name
    if name.lower().endswith("parquet"):
        parquet.write_table(pyarrow.table({"n": range(len(TEXTS)), "text": TEXTS}), path)
    else:
        write_jsonl(path)
    assert documents(path) == EXPECTED


def test_folders_and_globs_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "notes.md").write_text("not a corpus")
    assert documents(tmp_path) == ["a.txt", "b.txt", "sub/c.txt"]
    assert documents(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert documents(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]


def test_a_folder_is_read_as_git_and_datasets_would(tmp_path):
    """Hidden files, documentation and other formats are counted, not read; named explicitly they are read."""
    folder = tmp_path / "texts"
    for name in (
        *(
            "a.txt",
            "B.TXT",
            "sub/c.txt.bz2",
            "d.JSONL",
            ".e.txt",
            "._a.txt",
            ".git/f.txt",
            "sub/.ipynb_checkpoints/g.txt",
        ),
        *("__MACOSX/h.txt", "README.txt", "sub/Readme-first.TXT", "LICENSE.txt", "readers.txt", "i.csv", "j.CSV"),
        *("k.csv.gz", "l.json", "Makefile"),
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        content = json.dumps({"text": name}) if "JSONL" in name else name
        path.write_bytes(b"\xff" if "._" in name else PACKERS.get(path.suffix, bytes)(content.encode()))
    corpus = open_source(Source(str(folder)))
    assert list(corpus.documents()) == ["B.TXT", "a.txt", "d.JSONL", "readers.txt", "sub/c.txt.bz2"]
    expected = {"hidden": 5, ".csv": 2, "README.txt": 1, "Readme-first.TXT": 1, "LICENSE.txt": 1}
    assert corpus.not_read == expected | {".csv.gz": 1, ".json": 1, "others": 1}
    assert documents(folder / "*.t*") == ["a.txt", "readers.txt"]
    assert documents(folder / ".e*") == [".e.txt"] and documents(folder / ".git") == [".git/f.txt"]
    assert documents(folder / "__MACOSX" / "*.txt") == ["__MACOSX/h.txt"]
    assert documents(folder / "README.txt") == documents(folder / "READ*") == ["README.txt"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt"])
def test_links_to_folders_are_followed_and_loops_end(tmp_path, pattern):
    """Each document once, whatever number of links leads to it."""
    root = tmp_path / "texts"
    for name in ("here/a.txt", "here/deep/b.txt", "../elsewhere/c.txt", "../other/d.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for link, target in (
        *(("a_link", "../elsewhere"), ("again", "here"), ("here/self", "."), ("here/up", ".."), ("here/top", "/")),
        *(("../elsewhere/other", "../other"), ("../other/back", "../elsewhere"), ("one_file.txt", "here/a.txt")),
    ):
        (root / link).symlink_to(target)
    linked, own = ["../elsewhere/c.txt", "../other/d.txt"], ["here/a.txt", "here/deep/b.txt"]
    expected = [linked[0], own[0]] if pattern == "*/*.txt" else [*linked, *own, "here/a.txt"]
    assert documents(root / pattern) == expected


def test_another_text_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [json.dumps({"body": "x"})])
    assert documents(path, text_column="body") == ["x"]


@pytest.mark.parametrize("line", ["word " * 10 + "\n", "a line\n\n", "x" * 1000])
def test_long_text_files_are_cut_into_documents(tmp_path, line):
    text = line * (3 * MAX_TEXT_DOCUMENT // len(line))
    (tmp_path / "a.txt").write_text(text)
    pieces = documents(tmp_path / "a.txt")
    assert "".join(pieces) == text
    assert len(pieces) >= 3 and max(map(len, pieces)) <= MAX_TEXT_DOCUMENT
    if "\n" in line:
        assert all(piece.endswith(line[-2:]) for piece in pieces)


@pytest.mark.parametrize("line", ["word " * 10 + "\n", "a line\n\n", "é\n" * 7 + "\n", "", "x\n"])
def test_text_is_read_as_python_reads_it(tmp_path, line):
    """Without a byte-order mark and with universal newlines: the same documents, from any position."""
    text = line * (3 * MAX_TEXT_DOCUMENT // len(line) if len(line) > 2 else 1)
    path = tmp_path / "a.txt"
    path.write_text(text)
    expected = documents(path)
    for end, mark in (("\r\n", ""), ("\r", ""), ("\n", "\ufeff"), ("\r\n", "\ufeff")):
        path.write_text(mark + text, encoding="utf-8", newline=end)
        assert path.read_text(encoding="utf-8-sig") == "".join(expected) == text
        assert documents(path) == expected
        for number in range(len(expected)):
            blocks = open_source(Source(str(path))).blocks(Position(record=number))
            assert [text for block in blocks for text in block.texts] == expected[number:]
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\r\n" * 2 + b"\xff")
    with pytest.raises(UserError, match="not UTF-8 at byte 18 "):
        documents(path)


def test_builtin_is_this_pythons_standard_library():
    import json as json_package
    from pathlib import Path

    texts = set(documents("builtin"))
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
        documents(tmp_path / "a.jsonl")


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a whole parquet file"):
        documents(path)
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(UserError, match=r"no field 'text' among .'body'."):
        documents(path)
    parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(UserError, match="row 1: field 'text' is not text but int"):
        documents(path)


def test_bad_text_and_missing_files(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe bad")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 5 "):
        documents(tmp_path / "a.txt")
    for source, message in (
        (tmp_path / "none.txt", "no such file or folder"),
        (tmp_path / "none*.txt", "no file in it is in a format"),
        (tmp_path / "a.csv", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            documents(source)
    (tmp_path / "a.zip").write_text("a,b")
    with pytest.raises(UserError, match=r"no file in it is in a format that is read: \.parquet, "):
        documents(tmp_path / "a.zip")


def parquet_bytes(**columns) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def some_texts(count) -> list[str]:
    return [f"{i} " + "wörd " * (i * 37 % 900) for i in range(count)]


@pytest.fixture(scope="module")
def long_files(tmp_path_factory):
    """Each of several blocks."""
    folder = tmp_path_factory.mktemp("long")
    lines = "".join(json.dumps({"text": text, "n": i % 7}) + "\n" for i, text in enumerate(some_texts(1500))).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(
        pyarrow.table({"text": some_texts(1500), "n": [i % 7 for i in range(1500)]}),
        folder / "c.parquet",
        row_group_size=401,
    )
    (folder / "d.txt.zst").write_bytes(
        pyarrow.compress("\n\n".join(some_texts(1500)).encode(), codec="zstd", asbytes=True)
    )
    return folder


def test_reading_goes_on_from_every_block(long_files):
    """What follows a cursor is the same whether it was read before or not."""
    corpus = open_source(Source(str(long_files)))
    blocks = list(corpus.blocks(Position()))
    assert len(blocks) > 8 and {block.start.file for block in blocks} == {0, 1, 2, 3}
    for number, block in enumerate(blocks):
        rest = [text for later in blocks[number:] for text in later.texts]
        assert [text for later in corpus.blocks(block.start) for text in later.texts] == rest
    assert sum(block.size for block in blocks) == pytest.approx(corpus.bytes, rel=0.01)


def test_conditions_select_records(long_files):
    def kept(*where):
        return [int(text.split()[0]) for text in documents(long_files / "?.[jp]*", where=where)]

    assert kept() == [*range(1500)] * 3
    assert kept("n >= 3") == [i for i in range(1500) if i % 7 >= 3] * 3
    assert kept("n>=3", "n != 5") == [i for i in range(1500) if i % 7 in (3, 4, 6)] * 3
    assert kept("n in [0, 6]") == [i for i in range(1500) if i % 7 in (0, 6)] * 3


@pytest.mark.parametrize(
    ("text", "column", "comparison", "value"),
    [
        ("int_score >= 3", "int_score", ">=", 3),
        ("score<0.5", "score", "<", 0.5),
        ("language == en", "language", "==", "en"),
        ("language=='en'", "language", "==", "en"),
        ("meta-kind in ['a', 'b']", "meta-kind", "in", ["a", "b"]),
        ("indent > 1", "indent", ">", 1),
    ],
)
def test_conditions_are_read(text, column, comparison, value):
    assert Condition.parse(text) == Condition(column, comparison, value)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("n", "expected COLUMN OPERATOR VALUE"),
        ("n = 3", "expected COLUMN OPERATOR VALUE"),
        ("n in 3", "`in` takes a list"),
        ("n > x", "--where n > 'x': '>' not supported"),
        ("m > 1", "no field 'm' among"),
    ],
)
def test_bad_conditions(tmp_path, where, message):
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=message):
        documents(tmp_path, where=(where,))


def test_cut_off_files(tmp_path, long_files):
    """A broken download is reported, not read as the end."""
    for name, message in (
        ("b.jsonl.gz", "b.jsonl.gz: "),
        ("d.txt.zst", "d.txt.zst: "),
        ("c.parquet", "not a whole parquet file"),
        ("a.jsonl", "line [0-9]+: not JSON"),
    ):
        whole = (long_files / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(UserError, match=message):
            documents(tmp_path / name)
    for suffix, pack in PACKERS.items():
        packed = pack(b"some words, and others\n" * 100)
        for size in (0, 30):
            (tmp_path / f"a.txt{suffix}").write_bytes(packed[:size])
            with pytest.raises(UserError, match=rf"a\.txt{suffix}: the file is cut off"):
                documents(tmp_path / f"a.txt{suffix}")
        (tmp_path / f"a.txt{suffix}").write_bytes(packed + b"rubbish")
        with pytest.raises(UserError, match=rf"a\.txt{suffix}: "):
            documents(tmp_path / f"a.txt{suffix}")
    # Cut within its pages: the footer is there, the text is not.
    whole = (long_files / "c.parquet").read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[:2000] + bytes(3000) + whole[5000:])
    with pytest.raises(UserError, match=r"c\.parquet: "):
        documents(tmp_path / "c.parquet")


def test_other_file_systems(long_files):
    """By any protocol that `fsspec` knows."""
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in long_files.iterdir():
        memory.pipe(f"/corpus/{path.name}", path.read_bytes())
    assert documents("memory://corpus") == documents(long_files)
    assert documents("memory://corpus/*.parquet") == documents(long_files / "c.parquet")
    assert not open_source(Source("memory://corpus")).is_local
    with pytest.raises(UserError, match="source 'nosuch://x'"):
        documents("nosuch://x")


def test_hub_data_sets_are_streamed(tmp_path):
    """From a stand-in Hub on 127.0.0.1."""
    files = {f"data/train-0000{i}-of-00002.parquet": parquet_bytes(text=[f"{i} {t}" for t in TEXTS]) for i in (0, 1)}
    files["data/test-00000-of-00001.parquet"] = parquet_bytes(text=["a test"])
    program = "import json, sys; from data_prep.sources.source import Source; "
    program += "from data_prep.sources.opening import open_source; "
    program += "print(json.dumps(list(open_source(Source(sys.argv[1], split=sys.argv[2])).documents())))"
    with serve_dataset("user/corpus", files) as (endpoint, requests):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done, test, nosplit, missing = (
            subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
            for words in (["user/corpus", "train"], ["user/corpus", "test"], ["user/corpus", "dev"], ["user/none", "x"])
        )
    assert json.loads(done.stdout) == [f"{i} {text}" for i in (0, 1) for text in TEXTS], done.stderr
    assert json.loads(test.stdout) == ["a test"]
    assert any("resolve" in request and request.endswith(".parquet") for request in requests)
    assert "UserError: source 'user/corpus' has no split 'dev'; it has: " in nosplit.stderr
    assert "UserError: source 'user/none' is no local file" in missing.stderr


def test_what_is_no_name_of_a_data_set():
    for missing in ("user/corpus.txt", "./user/corpus", "a/b/c", "corpus"):
        with pytest.raises(UserError, match="no such file or folder"):
            documents(missing)


def test_the_file_that_is_broken_is_named(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "b.jsonl.gz").read_bytes()[:20] + b"rubbish")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: "):
        documents(tmp_path)


def test_conditions_need_columns(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(UserError, match=r"a\.txt: plain text has no columns for --where"):
        documents(tmp_path, where=("n > 3",))
    with pytest.raises(UserError, match=r"'builtin' is plain text; --name, .* and --where do not apply"):
        documents("builtin", where=("n > 3",))


def test_an_unfinished_cleaning_is_no_source(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="its cleaning has not finished"):
        documents(tmp_path)
    (tmp_path / "cleaning.json").write_text("[]")
    assert documents(tmp_path) == EXPECTED


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path):
    program = (
        "from data_prep.common.command_line import run; from data_prep.prepare import main\n"
        "from data_prep.sources import opening; opening.RESOLVE_DELAYS = (0,); run(main)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-c", program, "data", "--source", "user/corpus"]
    done = subprocess.run(
        words, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=tmp_path
    )
    *retried, last = done.stderr.splitlines()
    assert done.returncode == 2 and last.startswith("error: source 'user/corpus': the network fails ("), done.stderr
    assert len(retried) == 1 and "attempt 2 in 0 s" in retried[0] and not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("ALL_PROXY=socks://***@127.0.0.1:9", "Unknown scheme"),
        ("https_proxy=socks5://127.0.0.1:9", "SOCKS|socks"),
        ("HTTP_PROXY=foo://127.0.0.1:9", "Unknown scheme"),
        ("HTTPS_PROXY=http://127.0.0.1:port", "Invalid port"),
        ("SSL_CERT_FILE=/none", "No such file"),
        ("HF_ENDPOINT=huggingface.co", "does not begin with https://"),
    ],
)
def test_an_environment_without_a_way_to_the_hub_is_named(setting, reason, monkeypatch):
    """By all that asks it; not where nobody asks: in a folder, and offline."""
    name, _, value = setting.partition("=")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", value if name == "HF_ENDPOINT" else "http://127.0.0.1:9")
    monkeypatch.setenv(name, value.replace("***", "user:secret"))
    asking = {
        local_folder: "hf://datasets/user/corpus",
        Hub("user/corpus", "dataset").create: True,
        hf_tokenizer: "user/model",
        read_config: "user/model",
        from_pretrained: "user/model",
        documents: "user/corpus",
        partial(read_items, None): "user/corpus",
    }
    for ask, argument in asking.items():
        huggingface_hub.close_session()
        with pytest.raises(UserError, match=reason) as caught:
            ask(argument)
        assert f"{name}={value!r}" in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    limit_waiting()


@pytest.mark.processes
def test_what_needs_a_cache_names_it(tmp_path):
    """HF_HOME lies in a file, below which not even root can make a folder."""
    (tmp_path / "file").write_text("")
    program = """
from data_prep.common.command_line import UserError
from data_prep.common.hub import local_folder
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source
from data_prep.tokenization.tokenizer import hf_tokenizer
for use, name in (
    (local_folder, "hf://datasets/user/corpus"), (open_source, Source("user/corpus")), (hf_tokenizer, "user/model")
):
    try:
        use(name)
    except UserError as error:
        print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "file" / "home"), "PYTHONPATH": str(ROOT)}
    with serve() as hub:
        for place in ("datasets/user/corpus", "models/user/model"):
            hub.repositories[place] = Repository()
            hub.repositories[place].add({"README.md": b"words", "a.csv": b"text\na\n", "config.json": b"{}"}, "files")
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment | hub.environment(), capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout + done.stderr
    for line in lines:
        assert line.endswith("; set HF_HOME to a folder that can be written to"), line

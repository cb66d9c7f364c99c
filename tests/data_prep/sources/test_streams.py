"""Sources that the `datasets` library reads: the same documents, and the same shards after a kill."""

import csv
import io
import json
import os
import random
import signal
import sys
import tarfile

import datasets
import pytest
from conftest import ROOT, run_command
from standin_hub import serve_dataset

from data_prep.common.command_line import UserError
from data_prep.prepare import Recipe, prepare
from data_prep.sharding.manifest import Manifest
from data_prep.sources.opening import open_source
from data_prep.sources.source import Position, Source
from tests.data_prep.test_prepare import KILLED, contents, stopped

RECORDS = 3000


def _texts() -> list[str]:
    rng = random.Random(1)
    words = ["the", "quick", "brown", "été", "日本", 'a "quote"', "comma,", "1234"]
    texts = [f"{i} " + " ".join(rng.choices(words, k=rng.randrange(400))) for i in range(RECORDS)]
    texts[5:15] = [
        "NA",
        "null",
        "None",
        "nan",
        "N/A",
        "#N/A",
        "NULL",
        "True",
        "007",
        "1e5",
    ]  # what CSV has no types for
    return texts


TEXTS = _texts()
ROWS = {"text": TEXTS, "n": [i % 7 for i in range(RECORDS)]}


def csv_bytes() -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([("text", "n"), *zip(*ROWS.values(), strict=True)])
    return file.getvalue().encode()


def make_csv(folder):
    (folder / "a.csv").write_bytes(csv_bytes())
    return Source(str(folder / "a.csv"))


def make_json(folder):
    """An array of records, which is not JSON lines."""
    (folder / "a.json").write_text(json.dumps([{"text": text, "n": i % 7} for i, text in enumerate(TEXTS)]))
    return Source(str(folder))


def make_arrow(folder):
    data = datasets.Dataset.from_dict(ROWS)
    data.save_to_disk(folder / "saved", num_shards=3)
    for path in (folder / "saved").glob("*.json"):
        path.unlink()
    return Source(str(folder / "saved" / "*.arrow"))


def make_saved(folder):
    datasets.Dataset.from_dict(ROWS).save_to_disk(folder / "saved", num_shards=3)
    return Source(str(folder / "saved"))


def make_saved_selection(folder):
    """In an order of its own, which only the indices beside the files have."""
    reverse = datasets.Dataset.from_dict({name: column[::-1] for name, column in ROWS.items()})
    splits = {"train": reverse.select(range(RECORDS - 1, -1, -1)), "test": reverse.select([0])}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return Source(str(folder / "saved"))


def make_webdataset(folder):
    for number in range(2):
        with tarfile.open(folder / f"part-{number}.tar", "w") as archive:
            for i in range(number * RECORDS // 2, (number + 1) * RECORDS // 2):
                member = tarfile.TarInfo(f"{i:06d}.txt")
                content = TEXTS[i].encode()
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return Source(str(folder / "part-*.tar"), text_column="txt")


KINDS = [make_csv, make_json, make_arrow, make_saved, make_saved_selection, make_webdataset]


@pytest.fixture(params=KINDS, ids=lambda make: make.__name__.removeprefix("make_"))
def source(request, tmp_path, monkeypatch):
    """Read without a cache: where it would be there is a file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    (tmp_path / "file").write_text("")
    (tmp_path / "source").mkdir()
    return request.param(tmp_path / "source")


def test_documents_and_resumption(source, data_folder, tmp_path):
    """From each block on, and in shards after a stop at any of them."""
    corpus = open_source(source)
    blocks = list(corpus.blocks(Position()))
    assert [text for block in blocks for text in block.texts] == TEXTS and len(blocks) >= 3
    for number, block in enumerate(blocks):
        assert [text for later in corpus.blocks(block.start) for text in later.texts] == [
            text for later in blocks[number:] for text in later.texts
        ]
    recipe = Recipe(source, tokenizer=str(data_folder / "tokenizer"), shard_tokens=700_000)
    whole = prepare(recipe, tmp_path / "whole" / "data")
    assert len(whole.shards) > 2
    for count in range(1, len(whole.shards)):
        folder = tmp_path / str(count) / "data"
        with stopped(count, written=True):
            prepare(recipe, folder)
        prepare(recipe, folder)
        assert contents(folder) == contents(tmp_path / "whole" / "data")


def test_an_empty_cell_of_csv_is_missing(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tn\nNA\t1\n\t2\n""\t3\nnull\t\n1\t4\n2.50\tNA\n')
    assert list(open_source(Source(str(tmp_path))).documents()) == ["NA", "null", "1", "2.50"]
    assert list(open_source(Source(str(tmp_path), where=("n == NA",))).documents()) == ["2.50"]
    (tmp_path / "a.tsv").write_text("text\tn\nNA\t1\nnull\t\n1\t4\n")
    assert list(open_source(Source(str(tmp_path), where=("n >= 1",))).documents()) == ["NA", "1"]


def test_conditions_select_records_of_a_stream(tmp_path):
    source = make_csv(tmp_path)
    kept = list(open_source(Source(source.source, where=("n >= 3", "n != 5"))).documents())
    assert kept == [text for i, text in enumerate(TEXTS) if i % 7 in (3, 4, 6)]


HUB_KINDS = [
    make_csv,
    *(pytest.param(make, marks=pytest.mark.slow) for make in (make_json, make_arrow, make_webdataset)),
]


@pytest.mark.processes
@pytest.mark.parametrize("make", HUB_KINDS)
def test_a_data_set_of_the_hub_goes_on_after_a_kill(make, tmp_path, data_folder):
    """From a stand-in Hub on 127.0.0.1, killed at its third manifest: the same shards as from the files."""
    (tmp_path / "source").mkdir()
    source = make(tmp_path / "source")
    paths = [path for path in (tmp_path / "source").rglob("*") if path.is_file()]
    tokenizer = data_folder / "tokenizer"
    folder, program = tmp_path / "hub" / "data", tmp_path / "killed.py"
    program.write_text(KILLED)
    flags = ["--source", "user/corpus", "--text_column", source.text_column, "--tokenizer", tokenizer]
    words = [program, folder, *flags, "--shard_tokens", "300000"]
    with serve_dataset("user/corpus", {path.name: path.read_bytes() for path in paths}) as (endpoint, _):
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **home, "PYTHONPATH": str(ROOT)}
        run_command(sys.executable, *words, "manifest", "3", cwd=ROOT, env=environment, exit_code=-signal.SIGKILL)
        assert len(Manifest.load(folder).shards) == 2
        run_command(sys.executable, *words, "manifest", "1000", cwd=ROOT, env=environment)
    prepare(Recipe(source, tokenizer=str(tokenizer), shard_tokens=300_000), tmp_path / "file" / "data")
    shards = [{name: value for name, value in contents(path).items() if name.endswith(".npy")}
              for path in (folder, tmp_path / "file" / "data")]  # fmt: skip
    assert shards[0] == shards[1]
    assert Manifest.read(folder).source.commit == "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", b"body\nx\n", {}, "record 1: no field 'text' among"),
        ("a.csv", b'text\n"a\n', {}, "EOF inside string"),
        ("a.json", b"[1, 2", {}, "test_bad_files.*: "),
        ("a.arrow", b"ARROW1 not really", {}, "test_bad_files.*: "),
        ("a.tar", b"not a tar", {}, "test_bad_files.*: truncated header"),
        ("a.zip", b"PK", {}, "no file in it is in a format that is read"),
        ("state.json", b"{}", {}, "no file in it is in a format that is read"),
    ],
)
def test_bad_files(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(open_source(Source(str(tmp_path), **options)).documents())
    assert "\n" not in str(caught.value)


def test_files_of_several_formats_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "b.tsv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"files of several formats, .*a\.csv and .*b\.tsv; name one of them"):
        open_source(Source(str(tmp_path)))


def test_another_split_than_the_folder_has(tmp_path):
    source = make_saved_selection(tmp_path)
    with pytest.raises(UserError, match="has no split 'dev'; it has: test, train"):
        open_source(Source(source.source, split="dev"))
    assert list(open_source(Source(source.source, split="test")).documents()) == [TEXTS[-1]]

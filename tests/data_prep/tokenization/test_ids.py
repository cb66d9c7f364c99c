"""Token ids that are taken as they are."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data_prep.common.command_line import UserError
from data_prep.prepare import Recipe, prepare
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source
from data_prep.tokenization.tokenizer import gpt2_tokenizer, train_tokenizer
from tests.data_prep.test_prepare import stopped, texts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder with a tokenizer, and the tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(texts(500), 301)
    tokenizer.save(folder)
    return folder, tokenizer


def shards(folder) -> list[list[int]]:
    return [np.load(path).tolist() for path in sorted(folder.glob("*.npy"))]


def recipe(folder, path, **options) -> Recipe:
    return Recipe(Source(str(path), **options), tokenizer=str(folder), shard_tokens=20_000)


def write(path, column) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"ids": column}), path, row_group_size=300)
    else:
        path.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in column))


@pytest.mark.parametrize("eos", ["none", "first", "last"])
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_the_shards_are_those_of_the_text(tokenizer, tmp_path, name, eos):
    """Whichever side of a document its end of text is on, if any; after a stop as well."""
    folder, encoder = tokenizer
    documents = [text for text in texts(1000) if text and not text.isspace()]
    (tmp_path / "text").mkdir()
    write_text = tmp_path / "text" / "a.jsonl"
    write_text.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    prepare(recipe(folder, write_text), tmp_path / "text" / "data")
    column = [encoder.encode([text])[1:].tolist() for text in documents]
    column = [[300] * (eos == "first") + ids + [300] * (eos == "last") for ids in column]
    (tmp_path / "ids").mkdir()
    if name == "a.json":
        (tmp_path / "ids" / name).write_text(json.dumps([{"ids": ids} for ids in column]))
    else:
        write(tmp_path / "ids" / name, column)
    options = recipe(folder, tmp_path / "ids" / name, tokens_column="ids")
    with stopped(2, written=True):
        prepare(options, tmp_path / "out" / "data")
    prepare(options, tmp_path / "out" / "data")
    assert shards(tmp_path / "out" / "data") == shards(tmp_path / "text" / "data")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([[1, 2, 301]], "token id 301 is not among the 301 ids of tokenizer"),
        ([[1, -2]], "token id -2 is not among the 301 ids"),
        ([["a"]], "row 1: field 'ids' is not a list of token ids|line 1: field 'ids' is not a list of token ids"),
        ([[1.5]], "field 'ids' is not a list of token ids, which are whole numbers"),
        (["text"], "field 'ids' is not a list of token ids but str"),
        ([[1, None]], "field 'ids' is not a list of token ids, which are whole numbers"),
        ([list(range(260, 300)) * 20], "are not those of tokenizer .* come back when their text is encoded again"),
    ],
)
def test_bad_ids(tokenizer, tmp_path, name, column, message):
    write(tmp_path / name, column)
    with pytest.raises(UserError, match=message):
        prepare(recipe(tokenizer[0], tmp_path / name, tokens_column="ids"), tmp_path / "out" / "data")
    assert not (tmp_path / "out" / "data").exists()


def test_ids_of_another_tokenizer_are_refused(tokenizer, tmp_path):
    """GPT-2's below 301 are all valid ids of the other, whose text is another."""
    ids = [number for number in gpt2_tokenizer().encode(texts(200)).tolist() if number < 300]
    write(tmp_path / "a.parquet", [ids])
    with pytest.raises(UserError, match="are not those of tokenizer"):
        prepare(recipe(tokenizer[0], tmp_path / "a.parquet", tokens_column="ids"), tmp_path / "out" / "data")


def test_what_token_ids_cannot_have(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(UserError, match="plain text has no columns for --where"):
        open_source(Source(str(tmp_path), tokens_column="ids"))
    write(tmp_path / "a.parquet", [[1, 2]])
    source = Source(str(tmp_path / "a.parquet"), tokens_column="ids")
    with pytest.raises(UserError, match="a tokenizer is trained on text, not on token ids"):
        prepare(Recipe(source, tokenizer="bpe"), tmp_path / "out" / "data")

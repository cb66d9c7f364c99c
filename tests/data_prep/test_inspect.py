"""What `data_prep.inspect` shows of a folder: numbers, what a cleaning dropped, and token boundaries in colour."""

import itertools
import json
import re
import sys

import pytest
from conftest import ROOT, run_command
from transformers import AutoTokenizer

from data_prep.inspect import sample, shown
from data_prep.prepare import Recipe, prepare
from data_prep.sharding.manifest import Manifest
from data_prep.sources.source import Source

STEP = {"documents_in": 10, "documents_out": 4, "characters_in": 1000, "characters_out": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared from what a cleaning left, with characters of several tokens in the text."""
    source = tmp_path_factory.mktemp("source")
    texts = [f"number {i} été 日本 🙂\n" * (1 + i % 40) for i in range(300)]
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    step = {"step": "c4", "settings": {}, "sources": {"a": STEP}, "dropped": {"lorem_ipsum": 6}, **STEP}
    step["examples"] = {"lorem_ipsum": "Lorem ipsum\ndolor"}
    (source / "config.json").write_text("{}")
    (source / "cleaning.json").write_text(json.dumps([step]))
    folder = tmp_path_factory.mktemp("data") / "mine"
    prepare(Recipe(Source(str(source)), tokenizer="bpe", vocab_size=300, shard_tokens=5000), folder)
    return folder


def test_pieces_are_the_tokens(folder):
    """Each is the text of one token, and has another colour than those beside it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for _, ids in sample(folder, Manifest.read(folder), "train", 5, seed=1):
        painted = re.findall("\033\\[30;48;5;(\\d+)m([^\033]*)\033\\[0m", shown(tokenizer, ids, color=True))
        assert [piece.replace("⏎", "") for _, piece in painted] == [tokenizer.decode([number]) for number in ids]
        assert all(first != second for (first, _), (second, _) in itertools.pairwise(painted))


@pytest.mark.parametrize(("words", "colored"), [([], False), (["--color", "always"], True)])
def test_a_folder_is_shown(folder, words, colored):
    done = run_command(sys.executable, "-m", "data_prep.inspect", folder, *words, cwd=ROOT)
    assert ("\033[" in done.stdout) == colored
    assert "dropped     6 by c4, lorem_ipsum; for example: 'Lorem ipsum\\ndolor'" in done.stdout

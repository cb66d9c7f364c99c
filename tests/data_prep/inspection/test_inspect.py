"""What `data_prep.inspect` shows of documents: token boundaries in colour, and the HTML page."""

import html
import itertools
import json
import re
import sys
from html.parser import HTMLParser

import pytest
from conftest import ROOT, run_command
from transformers import AutoTokenizer

from data_prep.inspection.documents import sample
from data_prep.prepare import Recipe, prepare
from data_prep.reading.sources import Source
from data_prep.sharding.manifest import Manifest

STEP = {"documents_in": 10, "documents_out": 4, "characters_in": 1000, "characters_out": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared from what a cleaning left, with markup and characters of several tokens in the text."""
    source = tmp_path_factory.mktemp("source")
    texts = [f"<b>number {i}</b> & été 日本 🙂\n" * (1 + i % 40) for i in range(300)]
    (source / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    step = {"step": "c4", "settings": {}, "sources": {"a": STEP}, "dropped": {"lorem_ipsum": 6}, **STEP}
    step["examples"] = {"lorem_ipsum": "<script>alert('lorem ipsum')</script>"}
    (source / "config.json").write_text("{}")
    (source / "cleaning.json").write_text(json.dumps([step]))
    folder = tmp_path_factory.mktemp("data") / "mine"
    prepare(Recipe(Source(str(source)), tokenizer="bpe", vocab_size=300, shard_tokens=5000), folder)
    return folder


def inspect(folder, *words, exit_code=0):
    return run_command(sys.executable, "-m", "data_prep.inspect", folder, *words, cwd=ROOT, exit_code=exit_code)


def test_pieces_are_the_tokens(folder):
    """Each is the text of one token; with colours removed, the whole is the text but for characters in parts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for excerpt in sample(folder, Manifest.read(folder), "train", 5, seed=1):
        ids = tokenizer(excerpt.text)["input_ids"]
        assert excerpt.pieces[: len(ids) - 8] == [tokenizer.decode([number]) for number in ids][: len(ids) - 8]
        plain = re.sub("\033\\[[0-9;]*m", "", excerpt.shown(color=True)).replace("⏎", "")
        assert plain.removesuffix(" ...") == "".join(excerpt.pieces)
        backgrounds = re.findall(r"48;5;(\d+)m", excerpt.shown(color=True))
        assert len(backgrounds) == len(excerpt.pieces)
        assert all(first != second for first, second in itertools.pairwise(backgrounds))


@pytest.mark.parametrize(("words", "colored"), [([], False), (["--color", "always"], True)])
def test_colours_are_for_terminals(folder, words, colored):
    assert ("\033[" in inspect(folder, *words).stdout) == colored


class Page(HTMLParser):
    """Text of the page, of each element that may hold text of documents, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tokens, self.loads, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag == "span":
            self.tokens.append("")
        self.open.append(tag)

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "span":
            self.tokens[-1] += data


def test_the_page_has_all_of_it_and_loads_nothing(folder, tmp_path):
    done = inspect(folder, "--documents", "4", "--seed", "3", "--html", tmp_path / "page.html")
    assert done.stdout.endswith(f"page  {tmp_path / 'page.html'}\n")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    expected = [piece for e in sample(folder, Manifest.read(folder), "train", 4, seed=3) for piece in e.pieces]
    assert page.tokens == expected and page.loads == [] and not page.tags & {"script", "b"}
    for line in ("fertility", "lorem_ipsum 6", "40.0%", "30.0%", html.escape("<script>alert('lorem ipsum')</script>")):
        assert line in text or line.replace("&#x27;", "&#39;") in text
    manifest = Manifest.read(folder)
    assert f"{manifest.tokens('train'):,} for training" in text


def test_a_page_of_sequences_is_refused(folder, tmp_path):
    words = ["--html", tmp_path / "page.html", "--sequences", "0", "--run", "x"]
    assert "--html shows folders, not --sequences" in inspect(folder, *words, exit_code=2).stderr

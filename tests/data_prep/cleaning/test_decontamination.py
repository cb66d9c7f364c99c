"""Decontamination against the rule restated, and against HellaSwag items planted in real text."""

import json
import random

import numpy as np
import pytest
from conftest import DATA

from data_prep.cleaning.decontamination import Index, count_documents, cut, read_items, split_words
from data_prep.common.command_line import UserError
from data_prep.contamination import contamination, documents, item_ngram
from data_prep.prepare import Recipe, prepare
from data_prep.sharding.manifest import Manifest
from data_prep.sources.opening import open_source
from data_prep.sources.source import Source


def words_of(text) -> list[tuple[str, int, int]]:
    """Each text between white space, lower-cased and without punctuation, and the indices of its start and end."""
    words, index = [], 0
    while index < len(text):
        end = index
        while end < len(text) and not text[end].isspace():
            end += 1
        if word := "".join(character for character in text[index:end].lower() if character.isalnum()):
            words.append((word, index, end))
        index = end + 1
    return words


def spans_of(text, evaluation_texts, n=13) -> set[tuple[int, int]]:
    """Where an n-gram of the evaluation texts is, by comparing all words."""
    ngrams = set()
    for other in evaluation_texts:
        words = [word for word, _, _ in words_of(other)]
        own = min(n, len(words))
        if own >= 8:
            ngrams |= {tuple(words[i : i + own]) for i in range(len(words) - own + 1)}
    words, found = words_of(text), set()
    for i in range(len(words)):
        for own in {len(ngram) for ngram in ngrams}:
            if i + own <= len(words) and tuple(word for word, _, _ in words[i : i + own]) in ngrams:
                found.add((words[i][1], words[i + own - 1][2]))
    return found


def random_text(draw, words) -> str:
    """Words of a vocabulary of three, so that n-grams meet by chance, with all that must not matter about them."""
    around = ["", "", "", ",", ".", '"', "--", "\u00ad", "…"]
    letters = [draw.choice(["Ab", "aB", "ÄÖ", "äö", "İx7", "İX7"]) for _ in range(words)]
    return "".join(
        draw.choice(around)
        + word[:1]
        + draw.choice(["", "", "'"])
        + word[1:]
        + draw.choice(around)
        + draw.choice([" ", "\n", "\t ", " - ", "\u3000"])
        for word in letters
    )


def swapped(text) -> str:
    return "".join(c.swapcase() if len(c.swapcase()) == 1 else c for c in text)


@pytest.mark.parametrize("seed", range(6))
def test_ngrams_are_found_where_comparing_all_words_finds_them(seed):
    draw = random.Random(seed)
    evaluation = [random_text(draw, draw.randint(5, 16)) for _ in range(60)]
    text = " ".join(swapped(other) + " " + random_text(draw, 10) for other in evaluation)
    _, spans = Index.build(evaluation).find(text)
    expected = spans_of(text, evaluation)
    assert {tuple(span) for span in spans.tolist()} == expected
    assert len(expected) > 50


@pytest.mark.parametrize(
    "text", ["", " \n", "--- ...", "one", "İstanbul'da 50% «x_y»", "ὈΔΥΣΣΕΎΣ, (ὈΔΥΣΣΕΎΣ)", "a\x1fb"]
)
def test_words_of_odd_texts(text):
    assert split_words(text) == [word for word, _, _ in words_of(text)]


def test_short_evaluation_texts_are_matched_as_a_whole_from_eight_words_on():
    eight, seven = "one two three four five six seven eight", "red orange yellow green blue indigo violet"
    index = Index.build([eight, seven])
    assert index.lengths == (8,) and len(index.hashes) == 1
    text = f"so {seven}, then {eight.title()}!"
    assert [text[a:b] for a, b in index.find(text)[1]] == [f"{eight.title()}!"]
    assert not len(Index.build([]).find(text)[0])


def test_an_ngram_in_more_documents_than_the_bound_is_left_alone():
    common, rare = (" ".join(f"{kind}{i}" for i in range(13)) for kind in "cr")
    index = Index.build([common, rare])
    texts = [f"{common} {common} {i}" for i in range(11)] + [rare] * 10
    counts = count_documents(index, texts)
    assert sorted(counts.tolist()) == [10, 11]
    used = index.without(counts > 10)
    assert not len(used.find(common)[0]) and len(used.find(rare)[0]) == 1


def test_two_hundred_characters_are_cut_on_each_side():
    text = "".join(chr(ord("a") + i % 26) for i in range(2000))
    assert cut(text, np.array([[700, 800], [750, 900]])) == [text[:500], text[1100:]]
    assert cut(text, np.array([[399, 500]])) == [text[700:]], "199 characters before it are too few"
    assert cut(text, np.array([[400, 500]])) == [text[:200], text[700:]]
    assert cut(text, np.array([[100, 1500]])) == [text[1700:]]
    assert cut(text, np.array([[100, 1900]])) == []
    assert cut("short", np.empty((0, 2), dtype=int)) == ["short"]


@pytest.mark.parametrize(("gap", "kept"), [(300, True), (100, False)])
def test_a_document_in_more_than_ten_pieces_is_dropped(gap, kept):
    """Ten pieces or eleven; if they are short, they count nevertheless."""
    for collisions, left in ((9, 10 if kept else 0), (10, 0)):
        starts = [gap + 200 + i * (410 + gap) for i in range(collisions)]
        text = "x" * (starts[-1] + 210 + gap)
        assert len(cut(text, np.array([[start, start + 10] for start in starts]))) == left


def test_planted_hellaswag_items_are_cut_out_of_real_text(tmp_path):
    lines = (DATA / "hellaswag.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("\n".join(lines))
    text = (DATA / "shakespeare.txt").read_text()
    index = Index.build(text for item in read_items(path) for text in item)
    assert not len(index.find(text)[0]), "Shakespeare wrote none of them"
    for number, record in enumerate(records[::10]):
        item = f"{record['ctx']} {record['endings'][record['label']]}"
        if len(words_of(item)) < 13:
            continue
        before, after = text[number * 5000 :][:2000], text[number * 5000 + 2000 :][:2000]
        planted = before + "\n" + item.upper().replace(" ", ",\n") + "\n" + after
        pieces = cut(planted, index.find(planted)[1])
        assert len(pieces) == 2 and before.startswith(pieces[0]) and after.endswith(pieces[1])
        # The window is 200 characters beyond the item itself, which may begin and end with punctuation.
        assert 1790 <= len(pieces[0]) <= 1810 and 1790 <= len(pieces[1]) <= 1810
        assert not any(spans_of(piece, [item]) for piece in pieces)


def test_items_of_evaluation_files(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps({"ctx": "a b", "endings": ["c", "d"], "label": 1, "ind": "x\u2028y"}, ensure_ascii=False) + "\n\n"
    )
    assert list(read_items(path)) == [["a b c", "a b d"]]
    assert list(read_items(path, ["ind", "ctx"])) == [["x\u2028y a b"]]
    path.write_text(json.dumps({"question": "q", "choices": ["c", "d"], "answer": 0}))
    assert list(read_items(path)) == [["q", "c", "d"]]
    with pytest.raises(UserError, match=r"line 1: no text in a field 'answer' among .*'choices'"):
        list(read_items(path, ["question", "answer"]))
    path.write_text("[1]")
    with pytest.raises(UserError, match="line 1: not a JSON object but list"):
        list(read_items(path))
    text = tmp_path / "b.txt"
    text.write_text("one\ntwo\n\n \nthree\n")
    assert list(read_items(text)) == [["one\ntwo"], ["three\n"]]


def test_the_ngram_of_a_set_is_the_fifth_percentile_of_its_lengths():
    assert item_ngram([3] * 10 + [50] * 90) == 8 and item_ngram([50] * 100) == 13
    assert item_ngram([10] * 6 + [50] * 94) == 10


PLANTED = "Seven quiet herons stood beside the frozen river while nobody counted how many feathers fell"


@pytest.fixture(scope="module")
def planted_folder(tmp_path_factory, text_files):
    """Shards of real text; the planted sentence is in two documents, a common phrase in twelve."""
    common = "All rights in this program and in its manual are reserved by those who wrote them first"
    folder = tmp_path_factory.mktemp("planted")
    (folder / "text").mkdir()
    for number, path in enumerate(sorted(text_files.iterdir())[:16]):
        text = path.read_text(encoding="utf-8")
        text += f"\n# {PLANTED.lower()}!\n" if number in (7, 8) else ""
        text += f"\n# {common}\n" if number >= 4 else ""
        (folder / "text" / path.name).write_text(text, encoding="utf-8")
    recipe = Recipe(Source(str(folder / "text")), tokenizer="bpe", vocab_size=400, shard_tokens=4001)
    prepare(recipe, folder / "data")
    (folder / "eval.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [PLANTED, common, f"not {PLANTED[::-1]}", "too short"])
    )
    return folder


def test_documents_come_back_whole_from_their_shards(planted_folder):
    manifest = Manifest.read(planted_folder / "data")
    assert len(manifest.shards) > 16
    read = list(documents(planted_folder / "data", manifest))
    written = list(open_source(Source(str(planted_folder / "text"))).documents())
    ((cut_off, whole),) = [pair for pair in zip(read, written, strict=True) if pair[0] != pair[1]]
    assert whole.startswith(cut_off), "the document that validation ends in"


def test_contamination_reports_what_was_planted(planted_folder):
    (found,) = contamination(planted_folder / "data", [planted_folder / "eval.jsonl"])
    assert (found.items, found.short_items, found.found_items, found.documents) == (4, 1, 1, 2)
    assert found.ngram == 8 and found.examples[0][0] == 1
    assert found.found_ngrams == len(PLANTED.split()) - 8 + 1
    assert found.common_ngrams == 17 - 8 + 1
    assert "1 of 4 items found (25.00%)" in str(found)

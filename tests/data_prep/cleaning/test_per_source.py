"""Cleaning of sources that differ: steps for some, the Hub, archives of a crawl, languages."""

import io
import itertools
import json
import os
import sys

import pytest
import yaml
from conftest import ROOT, run_command
from standin_hub import serve_dataset
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_prep.clean import clean, read_config
from data_prep.common.command_line import UserError
from data_prep.common.schema import read_json
from data_prep.sources.source import CleaningStep
from tests.data_prep.test_clean import essay, read


def lines(texts, column="text") -> bytes:
    return "".join(json.dumps({column: text, "id": text[:30]}) + "\n" for text in texts).encode()


def write_config(folder, output="out", **settings):
    settings = {"output": str(folder / output), "tasks": 2, "executor_settings": {"start_method": "fork"}, **settings}
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(settings))
    return folder / f"{output}.yaml"


def texts_of(output) -> dict[str, set[str]]:
    return {name: {record["text"] for record in records} for name, records in read(output).items()}


def test_steps_for_some_of_the_sources(tmp_path):
    """Books are exempt from the minimum, code has a lower one, and only the web has a filter."""
    short, middle, long = "x" * 50, "y" * 150, essay(1)
    for name in ("web", "books", "code"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([short, middle, long], "body" if name == "books" else "text"))
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in ("web", "code")}
    sources["books"] = {"source": str(tmp_path / "books.jsonl"), "text_column": "body"}
    steps = [
        {"step": "RegexFilter", "regex_exp": r"\A[\s\S]{0,199}\Z", "sources": ["web"]},
        {"step": "RegexFilter", "regex_exp": r"\A[\s\S]{0,99}\Z", "sources": ["code"]},
        {"step": "FineWebQualityFilter", "sources": ["web"]},
    ]
    report = clean(read_config(write_config(tmp_path, sources=sources, steps=steps)))
    assert texts_of(tmp_path / "out") == {"web": {long}, "books": {short, middle, long}, "code": {middle, long}}
    assert [(step.documents_in, step.documents_out) for step in report] == [(9, 7), (7, 6), (6, 6)]
    assert {name: counts.documents_out for name, counts in report[1].sources.items()} == {
        "web": 1,
        "books": 3,
        "code": 2,
    }
    assert report[1].settings == {"sources": ["code"], "regex_exp": r"\A[\s\S]{0,99}\Z"}
    check_counts(report, texts_of(tmp_path / "out"))


def test_reasons_and_examples_are_those_of_all_sources(tmp_path):
    bad = essay(400) + "\nA line of lorem ipsum that nobody has replaced yet."
    for name in ("web", "books"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([essay(1), bad]))
    c4 = {"step": "C4QualityFilter", "filter_no_terminal_punct": False}
    sources = {name: str(tmp_path / f"{name}.jsonl") for name in ("web", "books")}
    (step,) = clean(read_config(write_config(tmp_path, sources=sources, steps=[c4])))
    assert step.dropped == {"lorem_ipsum": 2} and step.examples == {"lorem_ipsum": bad[:600]}


def test_a_data_set_of_the_hub_is_cleaned(tmp_path):
    """As a local copy of it is; two configurations of one repository, conditions, and a classifier trained on them."""
    texts = {name: [essay(i) for i in range(first, first + 40)] for name, first in (("en", 0), ("de", 100))}
    for name in texts:
        texts[name] += [texts[name][0], f"short {name}"]
    card = "---\nconfigs:\n" + "".join(f"- config_name: {n}\n  data_files: {n}/*.jsonl\n" for n in texts) + "---\n"
    files = {f"{name}/{i}.jsonl": lines(texts[name][i::2]) for name in texts for i in (0, 1)}
    files["README.md"] = card.encode()
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    steps = [
        {"step": "RegexFilter", "regex_exp": r"\A[\s\S]{0,299}\Z", "sources": ["en"]},
        "MinhashDedup",
        {"step": "QualityClassifier", "curated": ["en"], "raw": ["de"]},
    ]
    hub = {name: {"source": "user/corpus", "name": name, "where": ["id != x"]} for name in texts}
    config = write_config(tmp_path, sources=hub, steps=steps)
    with serve_dataset("user/corpus", files) as (endpoint, _):
        home = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **home, "PYTHONPATH": str(ROOT)}
        run_command(sys.executable, "-m", "data_prep.clean", config, cwd=ROOT, env=environment)
    local = {name: str(tmp_path / name) for name in texts}
    clean(read_config(write_config(tmp_path, "local", sources=local, steps=steps)))
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "local")
    report = read_json(tmp_path / "out" / "cleaning.json", list[CleaningStep])
    counts = [{name: counts.documents_out for name, counts in step.sources.items()} for step in report]
    assert counts[:2] == [{"en": 41, "de": 42}, {"en": 40, "de": 41}]
    check_counts(report, texts_of(tmp_path / "out"))
    assert 0 < report[2].documents_out < 81
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["found"]["en"]["commit"] == "0123456789abcdef0123456789abcdef01234567"


def check_counts(report: list[CleaningStep], left: dict[str, set[str]]) -> None:
    """Each step begins with what the one before has left, sources add up, and the last one's are the documents."""
    for before, step in itertools.pairwise(report):
        assert (before.documents_out, before.characters_out) == (step.documents_in, step.characters_in)
    for step in report:
        for count in ("documents_in", "documents_out", "characters_in", "characters_out"):
            assert getattr(step, count) == sum(getattr(source, count) for source in step.sources.values())
        assert sum(step.dropped.values()) in (0, step.documents_in - step.documents_out)
    for name, texts in left.items():
        assert report[-1].sources[name].documents_out == len(texts)
        assert report[-1].sources[name].characters_out == sum(map(len, texts))


def test_languages_that_are_all_certain_are_an_error():
    from datatrove.data import Document

    from data_prep.cleaning.steps import LanguageFilter

    def kept(best, found):
        step = LanguageFilter(languages=["en"])
        step.model.predict = lambda document: (best, found)
        return list(step.run([Document("text", "0")]))

    with pytest.raises(UserError, match=r"probabilities of languages add up to 2\.00, not 1"):
        kept(("en", 1.00001), {"en": 1.00001, "de": 1.00001})
    assert not kept(("de", 0.9), {"en": 0.1, "de": 0.9})
    assert kept(("en", 0.9), {"en": 0.9, "de": 0.1})


PAGES = 30


def page(number: int) -> bytes:
    """One in three in an old encoding."""
    paragraphs = "".join(f"<p>{essay(10 * number + i)} Café número {number}.</p>" for i in range(3))
    html = f"<html><head><title>Page {number}</title></head><body><nav><a href='/'>Home</a></nav>{paragraphs}"
    return f"{html}<footer>Imprint</footer></body></html>".encode("latin-1" if number % 3 == 0 else "utf-8")


def write_warc(path) -> None:
    """Responses among their requests, and pictures."""
    headers = [("Content-Type", "text/html"), ("X-Padding", "x" * 200)]
    with open(path, "wb") as file:
        writer = WARCWriter(file, gzip=True)
        for number in range(PAGES):
            url = f"http://example.org/{number}"
            request = StatusAndHeaders("GET / HTTP/1.0", [("Host", "example.org")], is_http_request=True)
            writer.write_record(writer.create_warc_record(url, "request", http_headers=request))
            kind, content = ("image/png", b"\x89PNG\r\n\x1a\n") if number % 5 == 4 else ("text/html", page(number))
            response = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.0")
            options = {"warc_headers_dict": {"WARC-Identified-Payload-Type": kind} if number % 2 else {}}
            payload = io.BytesIO(content)
            writer.write_record(
                writer.create_warc_record(url, "response", payload=payload, http_headers=response, **options)
            )


def test_text_is_taken_out_of_the_pages_of_a_crawl(tmp_path):
    """By datatrove's reader and blocks, from the archive to the report."""
    (tmp_path / "crawl").mkdir()
    write_warc(tmp_path / "crawl" / "a.warc.gz")
    sources = {"crawl": {"reader": "WarcReader", "data_folder": str(tmp_path / "crawl"), "glob_pattern": "*.warc.gz"}}
    url = {"step": "URLFilter", "use_integrated_lists": False, "banned_words": ["7"]}
    config = write_config(tmp_path, sources=sources, steps=["Trafilatura", url])
    extraction, by_url = clean(read_config(config))
    assert extraction.documents_in == extraction.documents_out == PAGES * 4 // 5
    assert by_url.dropped == {"hard_blacklisted": 1} and by_url.documents_out == PAGES * 4 // 5 - 1
    records = {record["metadata"]["url"]: record["text"] for record in read(tmp_path / "out")["crawl"]}
    assert "http://example.org/7" not in records
    text = records["http://example.org/8"]
    assert "Café número 8." in text and "<p>" not in text and "Imprint" not in text


def test_what_is_wrong_with_a_reader_of_datatrove(tmp_path):
    reader = {"reader": "WarkReader", "data_folder": "x"}, {"reader": "WarcReader", "glob": "x"}
    with pytest.raises(UserError) as raised:
        read_config(write_config(tmp_path, sources=dict(zip("ab", reader, strict=True)), steps=["Trafilatura"]))
    for problem in (
        "sources.a: unknown 'WarkReader'; did you mean 'WarcReader'?",
        "sources.b: data_folder is missing",
        "sources.b: unknown 'glob'",
    ):
        assert problem in str(raised.value)

"""Cleaning: what was planted is what the report counts, whoever does the work and however often it is interrupted."""

import json
import os
import random
import signal
import subprocess
import sys

import pyarrow
import pytest
import yaml
from conftest import ROOT
from pyarrow import parquet

from data_prep.clean import clean, read_config
from data_prep.common.command_line import UserError
from data_prep.prepare import Recipe, prepare
from data_prep.sources.source import Source

SENTENCES = "The {0} of the {1} was {2} to {3} with a {4} and {5} that {6} have {7}."
ITEM = "Twelve patient beekeepers carried one ladder across the muddy orchard before anyone else was awake today"


def essay(seed, sentences=12) -> str:
    """A paragraph that passes every filter: words drawn from thousands, between the stop words of English."""
    draw = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = ["".join(draw.choice("bdfglmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(8)]
        lines.append(SENTENCES.format(*words))
    return "\n".join(" ".join(lines[i : i + 2]) for i in range(0, sentences, 2))


MIN_LENGTH = {"step": "RegexFilter", "regex_exp": r"\A[\s\S]{0,199}\Z"}


def write_sources(folder, **sources) -> None:
    for name, texts in sources.items():
        (folder / name).mkdir()
        for part in range(3):
            lines = [json.dumps({"text": text, "id": f"{name}-{text[:30]}", "n": 1}) for text in texts[part::3]]
            (folder / name / f"{part}.jsonl").write_text("".join(line + "\n" for line in lines))


def config(folder, output="out", **changes):
    settings = {
        "sources": {path.name: str(path) for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "o"},
        "output": str(folder / output),
        "tasks": 3,
        "executor_settings": {"start_method": "fork"},
        **changes,
    }
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(settings))
    return read_config(folder / f"{output}.yaml")


def read(output) -> dict[str, list[dict]]:
    """The records of each source of a cleaned folder."""
    records: dict[str, list[dict]] = {}
    for path in sorted(output.glob("*/*.jsonl.zst")):
        with pyarrow.input_stream(str(path), compression="zstd") as file:
            records.setdefault(path.parent.name, []).extend(map(json.loads, file.read().splitlines()))
    return records


def files(output) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("*/*.zst")}


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One cleaning with steps over documents that each break one rule."""
    folder = tmp_path_factory.mktemp("everything")
    good = [essay(i) for i in range(12)]
    twin = essay(100)
    near = twin.replace(twin.split()[20], "changed", 1)
    # Real C4 and FineWeb rules, one each; the texts are otherwise like the good ones.
    planted = {
        "RegexFilter": ["The end.", "x" * 199],
        "GopherRepetitionFilter": [essay(200, 2) * 20],
        "GopherQualityFilter": [
            " ".join(f"{word[::-1]}." for word in essay(s).split() if len(word) > 5) for s in (300, 301)
        ],
        "C4QualityFilter": [essay(400) + "\nA line of lorem ipsum that nobody has replaced yet."],
        "FineWebQualityFilter": [essay(500).replace(".\n", "\n").removesuffix(".")],
    }
    contaminated = "\n".join([essay(600), f"{ITEM.upper()}!", essay(601)])
    web = good[:6] + [text for texts in planted.values() for text in texts] + [twin, contaminated]
    write_sources(folder, web=web, books=[*good[6:], good[0], near])
    (folder / "eval.txt").write_text(ITEM)
    steps = [
        MIN_LENGTH,
        "GopherRepetitionFilter",
        "GopherQualityFilter",
        {"step": "C4QualityFilter", "filter_no_terminal_punct": False},
        "FineWebQualityFilter",
        "MinhashDedup",
        {"step": "Decontamination", "against": [str(folder / "eval.txt")]},
    ]
    report = clean(config(folder, steps=steps))
    return folder, {step.step: step for step in report}, planted, good


def test_each_step_drops_what_was_planted_for_it(everything):
    _, report, planted, _ = everything
    expected = {name: len(texts) for name, texts in planted.items()} | {"MinhashDedup": 2}
    expected["Decontamination"] = -1  # one document is cut in two
    assert list(report) == list(expected)
    assert {name: step.documents_in - step.documents_out for name, step in report.items()} == expected
    assert report["C4QualityFilter"].dropped == {"lorem_ipsum": 1}
    assert report["FineWebQualityFilter"].dropped == {"line_punct_ratio": 1}


def test_good_documents_come_out_as_they_went_in(everything):
    folder, _, _, good = everything
    records = read(folder / "out")
    texts = [record["text"] for name in records for record in records[name]]
    assert set(good) < set(texts) and len(texts) == len(good) + 3
    for name in records:
        assert all(record["metadata"]["n"] == 1 and record["id"].startswith(name) for record in records[name])
        assert not any("_source" in record["metadata"] for record in records[name])
    assert not any("beekeepers" in text.lower() for text in texts)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["books", "cleaning.json", "config.json", "web"]


def test_what_was_cleaned_can_be_prepared(everything, tmp_path):
    folder, report, _, _ = everything
    recipe = Recipe(Source(str(folder / "out")), tokenizer="bpe", vocab_size=300)
    assert prepare(recipe, tmp_path / "data").cleaning == list(report.values())


def test_a_finished_cleaning_is_left_alone_and_another_refused(everything):
    folder, report, _, _ = everything
    before = files(folder / "out")
    steps = yaml.safe_load((folder / "out.yaml").read_text())["steps"]
    assert clean(config(folder, steps=steps, workers=2)) == list(report.values())
    assert files(folder / "out") == before
    changed = [*steps[:2], {"step": "GopherQualityFilter", "min_doc_words": 40}, *steps[3:]]
    message = r"steps.2.min_doc_words=None \(now: 40\), tasks=3 \(now: 4\); choose another output"
    with pytest.raises(UserError, match=message):
        clean(config(folder, steps=changed, tasks=4))
    with pytest.raises(UserError, match=r"steps.0.step='RegexFilter' \(now: 'GopherRepetitionFilter'\)"):
        clean(config(folder, steps=[steps[1], steps[0], *steps[2:]]))
    (folder / "other").mkdir()
    (folder / "other" / "mine.txt").touch()
    with pytest.raises(UserError, match="other exists and was not made by this program"):
        clean(config(folder, output="other", steps=steps))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two sources, and a cleaning of them with MinHash and the classifier by one worker."""
    folder = tmp_path_factory.mktemp("pairs")
    originals = [essay(i, 20) for i in range(8)]
    copies = []
    for number, text in enumerate(originals):
        words = text.split()
        for index in range(0, len(words), [60, 6][number % 2]):  # half of them are near duplicates
            words[index] = f"other{index}x"
        copies.append(" ".join(words))
    write_sources(folder, left=originals, right=copies)
    write_sources(folder, noise=[f"cheap offer {i} " * 100 for i in range(60)])
    classifier = {"step": "QualityClassifier", "curated": ["left"], "raw": ["noise"]}
    steps = [{"step": "MinhashDedup", "hashes_per_bucket": 9}, classifier]
    return folder, steps, clean(config(folder, steps=steps))


def test_any_number_of_workers_writes_the_same_bytes(pairs):
    folder, steps, report = pairs
    assert clean(config(folder, output="out2", steps=steps, workers=2)) == report
    assert files(folder / "out2") == files(folder / "out")
    assert all(0 < step.documents_out < step.documents_in for step in report)


@pytest.mark.processes
def test_a_killed_cleaning_goes_on_to_the_same_result(pairs):
    folder, steps, report = pairs
    config(folder, output="out3", steps=steps)
    words = [sys.executable, "-m", "data_prep.clean", str(folder / "out3.yaml")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        seen = next((line for line in process.stdout if line.startswith("6/")), None)
        os.killpg(process.pid, signal.SIGKILL)
    assert seen is not None and not (folder / "out3" / "cleaning.json").exists()
    assert not (folder / "out3" / "left").exists()
    # What was done is not done again: read once more, the raw documents would now be refused.
    raw = {path: path.read_bytes() for path in folder.glob("*/*.jsonl")}
    for path, content in raw.items():
        path.write_bytes(content.replace(b"{", b"[", 1))
    try:
        assert clean(config(folder, output="out3", steps=steps)) == report
    finally:
        for path, content in raw.items():
            path.write_bytes(content)
    assert files(folder / "out3") == files(folder / "out")


def test_all_that_is_wrong_with_a_configuration_is_said_at_once(tmp_path):
    write_sources(tmp_path, web=["a"])
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(
            {
                "sources": {"web": str(tmp_path / "none"), "../up": str(tmp_path / "web")},
                "output": str(tmp_path / "web" / "out"),
                "ouput": "x",
                "tasks": 0,
                "executor": "slrum",
                "steps": [
                    "GopherQualtyFilter",
                    {"step": "MinhashDedup", "num_buckets": 0, "sources": ["web"]},
                    {"step": "GopherQualityFilter", "min_doc_word": 3, "max_doc_words": "many"},
                    {"step": "GopherRepetitionFilter", "language": "klingon"},
                    {"step": "C4QualityFilter", "sources": ["wob"]},
                    {"step": "QualityClassifier", "curated": ["web"]},
                    {"step": "QualityClassifier", "curated": ["web"], "raw": ["wob"]},
                    {"step": "Decontamination", "against": ["none.jsonl"]},
                ],
            }
        )
    )
    with pytest.raises(UserError) as raised:
        read_config(tmp_path / "c.yaml")
    for problem in (
        "unknown 'ouput'; did you mean 'output'?",
        "lies within sources.../up=",
        "tasks=0: input should be greater than or equal to 1",
        "executor='slrum': input should be 'local', 'slurm' or 'ray'",
        "steps: unknown 'GopherQualtyFilter'; did you mean 'GopherQualityFilter'?",
        "steps.MinhashDedup: num_buckets=0: input should be greater than or equal to 1",
        "steps.MinhashDedup: it compares documents of all sources",
        "steps.GopherQualityFilter: unknown 'min_doc_word'; did you mean 'min_doc_words'?",
        "steps.GopherQualityFilter: max_doc_words='many': input should be a valid integer",
        "steps.GopherRepetitionFilter: ",
        "klingon",
        "steps.C4QualityFilter: sources: unknown 'wob'; did you mean 'web'?",
        "steps.QualityClassifier: raw is missing",
        "steps.QualityClassifier: curated and raw are names of sources: unknown 'wob'; did you mean 'web'?",
        "steps.Decontamination: against: 'none.jsonl' is not a file",
        "no such file or folder",
        "sources.../up: a name is made of",
    ):
        assert problem in str(raised.value)


def test_the_example_is_right_but_for_files_that_are_not_there():
    with pytest.raises(UserError) as raised:
        read_config(ROOT / "data_prep" / "configs" / "clean.yaml")
    problems = str(raised.value).split("\n  - ")[1:]
    assert len(problems) == 3 and all("raw/" in problem or "hellaswag" in problem for problem in problems)


def test_another_file_under_the_same_name_is_another_cleaning(tmp_path):
    write_sources(tmp_path, web=["a" * 300])
    clean(config(tmp_path, steps=[MIN_LENGTH]))
    with open(tmp_path / "web" / "0.jsonl", "a") as file:
        file.write(json.dumps({"text": "b" * 300}) + "\n")
    with pytest.raises(UserError, match=r"found\.web\.bytes=\d+ \(now: \d+\)"):
        clean(config(tmp_path, steps=[MIN_LENGTH]))


def test_slurm_says_what_its_executor_needs(tmp_path):
    write_sources(tmp_path, web=["a"])
    with pytest.raises(UserError) as raised:
        config(tmp_path, executor="slurm", executor_settings={"partitoin": "x"}, steps=[MIN_LENGTH])
    for problem in ("unknown 'partitoin'; did you mean 'partition'?", "time is missing", "partition is missing"):
        assert f"executor_settings: {problem}" in str(raised.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_record_ends_it_with_one_line_and_no_output(tmp_path, capfd, workers):
    write_sources(tmp_path, web=["a" * 300, "b" * 300])
    with open(tmp_path / "web" / "0.jsonl", "a") as file:
        file.write('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"0\.jsonl, line 2: no field 'text'"):
        clean(config(tmp_path, steps=[MIN_LENGTH], workers=workers))
    assert not list((tmp_path / "out").glob("*/*.zst")) and not (tmp_path / "out" / "cleaning.json").exists()
    assert capfd.readouterr().err == ""


def test_other_formats_other_columns_and_sources_without_documents(tmp_path):
    (tmp_path / "a").mkdir()
    parquet.write_table(
        pyarrow.table({"body": ["x" * 200, "x" * 199, ""], "n": [1, 2, 3]}), tmp_path / "a" / "x.parquet"
    )
    (tmp_path / "b.txt").write_text(" \n")
    sources = {"a": {"source": str(tmp_path / "a"), "text_column": "body"}, "b": str(tmp_path / "b.txt")}
    config(tmp_path, sources=sources, steps=[MIN_LENGTH])
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.clean", str(tmp_path / "out.yaml")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "source 'b': no document is left" in done.stdout and "50.0%" in done.stdout and done.stderr == ""
    (record,) = read(tmp_path / "out")["a"]
    assert record["text"] == "x" * 200 and record["metadata"] == {"n": 1}

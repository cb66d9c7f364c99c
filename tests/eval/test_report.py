"""Reports of the logs of real runs and of other trainers."""

import base64
import email.message
import html.parser
import json
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, run_command

from data_prep.common.command_line import UserError
from data_prep.contamination import contamination, record, recorded
from eval.report import write_report
from eval.reporting.plots import plot_all
from eval.reporting.records import Curve, Environment, Sample, of_the_same_size, read_run
from eval.reporting.sections import write_page

NANOGPT_LOG = "0 val 10.9512\n0 hella 0.2463\n0 train 10.955029\n1 train 9.5\n2 val 9.7\n2 hella 0.2501\n"
LLM_C_LOG = (
    "s:0 tel:11.0100\ns:0 eval:0.2440\ns:0 trl:10.9900 lr:0.000001 norm:15.20\n"
    "s:1 trl:10.5000 lr:0.000002 norm:12.20\ns:1 trl:10.4000 lr:0.000002 norm:12.10\n"
)


def table(text, heading):
    """The rows of the table under a heading, by its first column, each a dictionary by the columns' names."""
    lines = text.split(f"## {heading}\n\n", 1)[1].split("\n\n")[0].splitlines()
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in rows}


def is_picture(path, at_least):
    content = path.read_bytes()
    width, height = (int.from_bytes(content[start : start + 4]) for start in (16, 20))
    return content.startswith(b"\x89PNG") and width >= at_least and height >= at_least // 3


class Page(html.parser.HTMLParser):
    """The elements of an HTML file with their attributes, and the text of its body."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if ("body", {}) in self.elements:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_a_run_writes_its_report(tiny_run):
    folder = tiny_run.folder / "report"
    text = (folder / "report.md").read_text()
    metrics = tiny_run.metrics()
    row = table(text, "Results")["**tiny**"]
    assert float(row["validation loss"]) == pytest.approx(metrics[20]["val_loss"], abs=1e-4)
    assert float(row["bits per byte"]) == pytest.approx(metrics[20]["val_bits_per_byte"], abs=1e-4)
    assert row["tokens"] == f"{20 * 512:,}"
    assert int(row["parameters"].replace(",", "")) == 32 * (601 + 32) + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert table(text, "Settings")["`n_embd`"] == {"tiny": "32"}
    assert "has not been searched for evaluation sets" in text
    assert "commit " in text and "training/train.py" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["loss.png", "training.png"]
    assert all(is_picture(folder / name, at_least=900) for name in pictures)
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_the_page_is_the_report_in_one_file(tiny_run):
    folder = tiny_run.folder / "report"
    page, text = Page(folder / "report.html"), (folder / "report.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 50 and all(cell.strip("*`") in page.text for row in rows for cell in row)
    names = re.findall(r"!\[.*\]\((.*)\)", text)
    pictures = [base64.b64decode(one["src"].removeprefix("data:image/png;base64,")) for one in page.all("img")]
    assert pictures == [(folder / name).read_bytes() for name in names]
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert len(page.all("a")) == 4 and {one["href"].removeprefix("#") for one in page.all("a")} <= targets
    assert "report           runs/tiny/report/report.html" in tiny_run.stdout


def test_nothing_in_a_page_runs_or_is_fetched(tmp_path):
    """Whatever data says: a model may write HTML and Markdown, and a setting may be an address."""
    (tmp_path / "secret.png").write_bytes(b"not a picture of this report")
    hostile = [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![beacon](https://example.com/b.png)",
        "![other](secret.png)",
        "[link](javascript:alert(1))",
        "</table></div></body>",
    ]
    rows = "".join(f"| {one} |\n" for one in hostile)
    blocks = "\n\n".join(f"{one}\n\n```text\n{one}\n```" for one in hostile)
    write_page(tmp_path / "page.html", f"# <b>Title</b>\n\n| a |\n| --- |\n{rows}\n\n{blocks}\n", [])
    page = Page(tmp_path / "page.html")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "link", "b"}
    assert not [one for one in page.all("a") if not one["href"].startswith("#")]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") == 3 and "<b>Title</b>" in page.text
    assert page.all("meta")[2]["content"].startswith("default-src 'none';")


def test_what_the_curves_say(tiny_run):
    run, metrics = read_run(tiny_run.folder), tiny_run.metrics()
    assert run.curves["loss"].values == tiny_run.losses()
    assert run.curves["val_loss"].steps == [0, 5, 10, 15, 20]
    seconds = run.seconds()
    assert seconds.steps == list(range(21))
    assert seconds.at(3) == pytest.approx(sum(512 / metrics[step]["tokens_per_second"] for step in range(3)))
    assert run.tokens().at(3) == 3 * 512


def test_batches_that_grow_and_steps_without_one(tmp_path):
    """Tokens and time of a run that branched off at step 4, with a ramp, whose step 6 skipped its batch."""
    lines = [(4, 1000, 100, 50.0), (5, 1200, 200, 100.0), (7, 1600, 200, 50.0)]
    keys = ("step", "tokens", "batch_tokens", "tokens_per_second")
    text = [json.dumps(dict(zip(keys, line, strict=True))) for line in lines]
    text.insert(2, json.dumps({"step": 6, "skipped": [3, 4]}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    run = read_run(tmp_path)
    assert [run.tokens().at(step) for step in (4, 5, 6, 8)] == [900, 1000, 1200, 1600]
    assert [run.seconds().at(step) for step in (4, 5, 6, 8)] == [0, 2, 4, 8]


def test_logs_of_other_trainers(tmp_path):
    (tmp_path / "log.txt").write_text(NANOGPT_LOG)
    (tmp_path / "main.log").write_text(LLM_C_LOG)
    run = read_run(tmp_path / "log.txt")
    assert run.curves == {
        "val_loss": Curve([0, 2], [10.9512, 9.7]),
        "hellaswag/completion/acc_norm": Curve([0, 2], [0.2463, 0.2501]),
        "loss": Curve([0, 1], [10.955029, 9.5]),
    }
    run = read_run(tmp_path / "main.log", batch_tokens=524288)
    assert run.curves["loss"] == Curve([0, 1], [10.99, 10.4]), "of a step that was done again the later value holds"
    assert run.curves["grad_norm"].values == [15.2, 12.1] and run.tokens().values == [0, 524288, 2 * 524288]


def test_several_runs_are_compared(tiny_run, tmp_path):
    (tmp_path / "log.txt").write_text(NANOGPT_LOG)
    other = shutil.copytree(tiny_run.folder, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.01", "learning_rate: 0.02"))
    done = run_command(sys.executable, "-m", "eval.report", tiny_run.folder, other, tmp_path / "log.txt", cwd=tmp_path)
    assert done.stdout.strip() == "report/report.html"
    text = (tmp_path / "report" / "report.md").read_text()
    rows = table(text, "Results")
    assert [*rows] == ["**tiny**", "**other**", f"**{tmp_path.name}/log.txt**"]
    assert rows[f"**{tmp_path.name}/log.txt**"]["HellaSwag, completion"] == "0.2501"
    assert table(text, "Settings that differ") == {"`learning_rate`": {"tiny": "0.01", "other": "0.02"}}
    assert is_picture(tmp_path / "report" / "hellaswag.png", at_least=500)


@pytest.mark.parametrize("name", ["report.md", "report.html", "loss.png"])
def test_files_of_the_user_are_not_written_over(tiny_run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    command = [sys.executable, "-m", "eval.report", tiny_run.folder, "--output", tmp_path]
    refused = run_command(*command, cwd=ROOT, exit_code=2)
    assert refused.stderr.count("\n") == 1 and "--output" in refused.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / name).unlink()
    for _ in range(2):  # a report of ours makes room for the next
        run_command(*command, cwd=ROOT)
    (tmp_path / "report.html").write_text("mine, made of report.md")
    assert "report.html exists" in run_command(*command, cwd=ROOT, exit_code=2).stderr
    assert (tmp_path / "report.html").read_text() == "mine, made of report.md"


def test_a_model_of_a_published_size_is_put_beside_it(tmp_path):
    (tmp_path / "log.txt").write_text(NANOGPT_LOG)
    run = read_run(tmp_path / "log.txt", batch_tokens=524288)
    run.environment = Environment(
        command=["/home/me/training/train.py", "--seed", "1"],
        python="3.11",
        platform="Linux",
        packages={},
        git_revision=None,
        device="NVIDIA A100",
        num_processes=8,
        distributed_type="MULTI_GPU",
        mixed_precision="bf16",
        parameters=124_439_808,
        data=[],
    )
    run.harness["step_00000001"] = {
        "lambada_openai": {"acc": 0.3, "perplexity": 40.5, "other": 1.0},
        "triviaqa": {"exact_match,remove_whitespace": 0.25},
        "arc_easy": {"acc": 0.5},
        "gpt3_zero_shot": {},
    }
    text = write_report([run], tmp_path / "report").read_text()
    assert "| task | scores | GPT-3 125M |" in text
    assert "| lambada_openai | acc 0.3000, perplexity 40.5000, other 1.0000 | acc 0.4270, perplexity 18.6000 |" in text
    assert "| exact_match,remove_whitespace 0.2500 | exact_match,remove_whitespace 0.0415 |" in text
    assert "| arc_easy | acc 0.5000 |  |" in text, "GPT-3's is of another metric"
    assert "gpt3_zero_shot" not in text
    assert "\n- `training/train.py --seed 1`\n" in text
    rows = table(text, "Results")
    assert rows["GPT-2 124M"]["HellaSwag, completion"] == "0.2955"
    assert rows["GPT-2 124M"]["HellaSwag, lm_eval"] == "0.3114"
    assert rows["GPT-3 125M"]["HellaSwag, completion"] == "0.3370"
    assert rows[f"**{tmp_path.name}/log.txt**"]["tokens"] == f"{2 * 524288:,}"


def test_sizes():
    names = {size: [model.name for model in of_the_same_size(size)] for size in (2e6, 124e6, 1.5e9, None)}
    assert names[124e6] == ["GPT-2 124M", "build-nanogpt 124M", "GPT-3 125M"]
    assert names[1.5e9] == ["GPT-2 1558M", "GPT-3 1.3B"] and names[2e6] == names[None] == []


def test_contamination_is_reported_of_the_shards_that_are_there(tiny_run, data_folder, tmp_path):
    """By evaluation set, beside what was found before; not for shards that were prepared anew."""
    data = shutil.copytree(data_folder, tmp_path / "data")
    run = shutil.copytree(tiny_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    environment = json.loads((run / "environment.json").read_text())
    environment["data"][0]["folder"] = str(data)
    (run / "environment.json").write_text(json.dumps(environment))

    (tmp_path / "clean.txt").write_text(
        "Nothing that a module of the standard library would ever say of itself or others"
    )
    source = Path(email.message.__file__).read_text().split()
    (tmp_path / "found.txt").write_text(" ".join(source[100:160]))
    for name in ("clean.txt", "found.txt"):
        record(data, contamination(data, [tmp_path / name]))
    assert [one.file for one in recorded(data)] == [str(tmp_path / name) for name in ("clean.txt", "found.txt")]
    text = write_report([read_run(run)], tmp_path / "report").read_text()
    assert "Contamination: of clean.txt, 0 of 1 items (0.00%)" in text
    assert "Contamination: of found.txt, 1 of 1 items (100.00%)" in text

    manifest = json.loads((data / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (data / "manifest.json").write_text(json.dumps(manifest))
    assert recorded(data) is None
    assert "has not been searched" in write_report([read_run(run)], tmp_path / "report").read_text()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("0 val 1.0\nwhat is this\n", "line 2: not a line of build-nanogpt's or llm.c's logs"),
        ("s:0 tel:high\n", "line 1: 'high' is not a number"),
        ("", "there is nothing in it"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path, log, message):
    (tmp_path / "log.txt").write_text(log)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)


def test_the_overview_shows_the_first_and_the_last_samples(tiny_run, tmp_path):
    def overview(*texts):
        samples = [Sample(step, "def", text) for step, text in enumerate(texts)]
        paths = plot_all([replace(read_run(tiny_run.folder), samples=samples)], tmp_path)
        assert [path.name for path in paths] == ["overview.png", "loss.png", "training.png"]
        assert is_picture(paths[0], at_least=700)
        return paths[0].read_bytes()

    with warnings.catch_warnings(action="error"):  # of letters that the font lacks
        first = overview("a", "b", "c")
        assert first == overview("a", "another", "c") != overview("a", "b", "d") != overview("d", "b", "d")
        overview("")
        overview("\u6587 \U0001f389 $\\frac{1}$ \0\x1b[31m\ud800 \t" + 500 * "x", "\n" * 50)


def test_a_log_of_something_else_has_no_pictures(tmp_path):
    (tmp_path / "log.txt").write_text("0 other 1.0\n")
    assert plot_all([read_run(tmp_path)], tmp_path) == []


def test_a_run_that_diverged_has_its_report(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 10.0\n1 train nan\n1 val nan\n2 train inf\n3 train 9.0\n3 val 9.5\n")
    text = write_report([read_run(tmp_path)], tmp_path / "report").read_text()
    assert "9.5000" in text and is_picture(tmp_path / "report" / "loss.png", at_least=500)


def test_results_of_the_harness_add_up(tiny_run, tmp_path):
    """Those of a run and of later commands on the same checkpoint."""
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    for name, task in (("lm_eval.json", "a"), ("lm_eval_2026-01-01.json", "b"), ("lm_eval_2026-01-02.json", "c")):
        scores = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": task}
        (run / "checkpoints" / f"step_00000020.{name}").write_text(json.dumps({"results": {task: scores}}))
    rows = write_report([read_run(run)], tmp_path / "report").read_text()
    for task in "abc":
        assert f"| run | step_00000020 | {task} | acc 0.5000 |" in rows


def test_a_run_that_has_just_begun_has_nothing_to_report(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="there is nothing in it yet"):
        read_run(run)

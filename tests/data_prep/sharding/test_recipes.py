"""Recipe files: those of the project against a stand-in Hub, and what a wrong one says."""

import io
import json
import os
import sys

import pyarrow
import pytest
import yaml
from conftest import ROOT, run_command
from pyarrow import parquet
from standin_hub import COMMIT, Repository, serve

from data_prep.common.command_line import UserError
from data_prep.prepare import check_sources, read_recipes, training_flags
from data_prep.sharding.manifest import Manifest
from data_prep.sources.source import Source
from data_prep.tokenization.tokenizer import gpt2_tokenizer
from tests.data_prep.test_prepare import texts

RECIPES = sorted(path for path in (ROOT / "data_prep" / "configs").glob("*.yaml") if path.name != "clean.yaml")


def small_copy(settings: Source) -> tuple[str, dict[str, bytes]]:
    """Name and files of a data set with the configuration, split and column of a source."""
    documents = texts(150)
    if settings.source.startswith("hf://"):  # a folder of lines
        owner, name, folder = settings.source.removeprefix("hf://datasets/").split("/", 2)
        content = "".join(json.dumps({settings.text_column: text}) + "\n" for text in documents).encode()
        return f"{owner}/{name}", {f"{folder}/0.jsonl": content}
    place = f"{settings.name or 'data'}/{settings.split}"
    card = {"configs": [{"config_name": settings.name or "default",
                         "data_files": [{"split": settings.split, "path": f"{place}*"}]}]}  # fmt: skip
    if settings.tokens_column is not None:
        rows = [{settings.tokens_column: gpt2_tokenizer().encode([text])[1:].tolist()} for text in documents if text]
        name, content = f"{place}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table({settings.text_column: documents}), buffer)
        name, content = f"{place}-00000.parquet", buffer.getvalue()
    return settings.source, {"README.md": f"---\n{yaml.safe_dump(card)}---\n".encode(), name: content}


SLOW = ("fineweb_edu_100b", "slimpajama")  # much like others


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW), id=path.stem) for path in RECIPES],
)
def test_each_recipe_is_prepared_from_a_hub(path, tmp_path):
    """With a small copy of each data set; the folders are relative to where the command runs."""
    recipes = read_recipes(path)
    folders = yaml.safe_load(path.read_text())["folders"]
    small = {name: {"shard_tokens": 1000, **settings} for name, settings in folders.items()}
    (tmp_path / path.name).write_text(yaml.safe_dump({"folders": small}, sort_keys=False))
    with serve() as hub:
        for recipe in recipes.values():
            name, files = small_copy(recipe.source)
            hub.repositories.setdefault(f"datasets/{name}", Repository()).add(files, "files", COMMIT)
        environment = {**os.environ, **hub.environment(), "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        done = run_command(
            sys.executable, "-m", "data_prep.prepare", path.name, "--workers", "1", cwd=tmp_path, env=environment
        )
    for name, recipe in recipes.items():
        manifest = Manifest.read(tmp_path / name)
        assert manifest.source.source == recipe.source.source
        assert manifest.source.commit == (None if recipe.source.source.startswith("hf://") else COMMIT)
        assert manifest.tokens("train") > 0 and manifest.tokenizer.name == "gpt2"
    assert f"--data {' '.join(map(str, recipes))}" in done.stdout
    assert ("--data_weights" in done.stdout) == (None not in [recipe.weight for recipe in recipes.values()])


def test_the_flags_are_those_of_the_trainer():
    flags = training_flags(read_recipes(ROOT / "data_prep" / "configs" / "gpt3_mixture.yaml"))
    names = [f"data/gpt3-{name}" for name in ("crawl", "webtext", "books", "wikipedia")]
    assert flags == f"--data {' '.join(names)} --data_weights 60 22 16 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("folders: {}", "folders={}: dictionary should have at least 1 item"),
        ("folders: {a: {name: x}}", "source is missing"),
        ("folders: {a: {source: x, colunm: y}}", "a: unknown 'colunm'"),
        ("folders: {a: {source: x, weight: 0}}", "weight=0: input should be greater than 0"),
        ("folders: {a: {source: x, weight: 1}, b: {source: y}}", "b has no weight, others have"),
        ("folder: {}", "unknown 'folder'; did you mean 'folders'?"),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path, content, message):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(UserError) as raised:
        read_recipes(tmp_path / "r.yaml")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["r.yaml", "--source", "x"], "source is a setting in the recipe file; give --workers and --engine only"),
        (["folder"], "no --source is given, and no recipe file"),
    ],
)
def test_options_and_recipes_do_not_mix(tmp_path, words, message):
    (tmp_path / "r.yaml").write_text("folders: {a: {source: builtin}}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "data_prep.prepare", *words]
    done = run_command(*words, cwd=tmp_path, env=environment, exit_code=2)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_all_sources_are_found_before_the_first_folder_is_made(tmp_path):
    sources = {"a": "builtin", "my b": "none.jsonl", "c": "missing/*.parquet"}
    folders = {str(tmp_path / name): {"source": source} for name, source in sources.items()}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"folders": folders}, sort_keys=False))
    recipes = read_recipes(tmp_path / "r.yaml")
    with pytest.raises(UserError, match="2 folders cannot be prepared") as raised:
        check_sources(recipes)
    assert "none.jsonl" in str(raised.value) and "missing/*.parquet" in str(raised.value)
    assert f"'{tmp_path}/my b'" in training_flags(recipes)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "data_prep.prepare", "r.yaml"]
    assert "2 folders" in run_command(*words, cwd=tmp_path, env=environment, exit_code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]

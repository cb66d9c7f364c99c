"""The notebook, as it is committed and as it runs, in a folder like a clone of the project."""

import math
import re
import subprocess
from typing import Any

import pytest
from conftest import ROOT
from project import link_project

pytestmark = pytest.mark.docs
nbformat = pytest.importorskip("nbformat")  # of the extra `notebook`
NotebookClient = pytest.importorskip("nbclient").NotebookClient
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def run(notebook: Any, folder) -> dict[str, list]:
    """The outputs of each cell, by its id."""
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def text(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.fixture
def notebook(tmp_path, monkeypatch) -> Any:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
    return nbformat.read(NOTEBOOK, as_version=4)


def test_no_results_are_committed(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


def test_it_runs(notebook, tmp_path):
    clone = tmp_path / "clone"
    clone.mkdir()
    link_project(clone)
    (clone / "notebooks").unlink()
    (clone / "notebooks").mkdir()  # a link to it would lead to another clone
    outputs = run(notebook, clone / "notebooks")
    said = {name: text(found) for name, found in outputs.items()}

    assert said["setup"] == ""
    assert "training and" in said["prepare"] and (clone / "data" / "python" / "manifest.json").is_file()
    losses = [float(loss) for loss in re.findall(r"validation loss ([\d.]+)", said["train"])]
    assert losses[0] == pytest.approx(8.3, abs=0.2) and losses[-1] < 6
    assert any("image/png" in output.get("data", {}) for output in outputs["curves"])
    assert said["samples"].startswith("def ") and len(said["samples"]) > 20
    loss, perplexity = re.match(r"loss ([\d.]+) nats per token, perplexity ([\d.]+)", said["evaluate"]).groups()
    assert 3 < float(loss) < losses[0] and float(perplexity) == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert "GPT2LMHeadModel 1,725,696 parameters\nimport " in said["transformers"]
    assert re.search(r"step    100  published http://127.0.0.1:\d+/user/notebook/commit/[0-9a-f]{40}", said["publish"])
    assert said["load"].startswith("import ")


def test_its_first_cell_makes_the_clone_in_colab(notebook, tmp_path, monkeypatch):
    """In a folder with nothing, where `google.colab` is; pip says what it is asked for."""
    programs, origin, content = (tmp_path / name for name in ("programs", "origin", "content"))
    for folder in (programs / "google" / "colab", origin / "training", content):
        folder.mkdir(parents=True)
    (programs / "google" / "colab" / "__init__.py").touch()
    (programs / "pip").write_text("#!/bin/sh\necho pip $*\n")
    (programs / "pip").chmod(0o755)
    (origin / "training" / "train.py").touch()
    commit = ["git", "-c", "user.name=A", "-c", "user.email=a@b", "commit", "--quiet", "--message", "all"]
    for command in (["git", "init", "--quiet"], ["git", "add", "."], commit):
        subprocess.run(command, cwd=origin, check=True)
    monkeypatch.setenv("PYTHONPATH", str(programs))
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    (setup,) = (cell for cell in notebook.cells if cell.id == "setup")
    setup.source = re.sub(r'REPOSITORY = ".*"', f'REPOSITORY = "{origin}"', setup.source)
    again = nbformat.v4.new_code_cell(setup.source, id="again")
    notebook.cells = [setup, nbformat.v4.new_code_cell("!pwd", id="where"), again]
    outputs = run(notebook, content)
    assert text(outputs["setup"]).split() == ["pip", "install", "--quiet", "-e", "gpt-accelerate"]
    assert text(outputs["where"]).strip() == str(content / "gpt-accelerate")
    assert text(outputs["again"]) == ""
    assert text(run(notebook, content)["setup"]) == ""  # after a restart of the session

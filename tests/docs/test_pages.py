"""Every command on the pages, run as it stands there: block after block, in a folder like a clone of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA, ROOT
from project import link_project
from standin_hub import USER, serve

pytestmark = pytest.mark.docs
PAGES = ["docs/data.md", "docs/training.md", "docs/evaluation.md", "docs/releasing.md", "docs/chat.md"]
# The pages assume that the quickstart has been run: here by a smaller model, unless the project has its run.
QUICKSTART = "--n_layer 1 --n_embd 64 --n_head 1 --sequence_length 32 --batch_tokens 32 "
QUICKSTART += "--per_device_train_batch_size 1 --val_tokens 256"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
NOT_RUN = "# not run by the tests: "


def blocks(page: Path) -> list[tuple[str, str]]:
    """The language and the text of each block that is to be run."""
    text = page.read_text(encoding="utf-8").replace("USER/", f"{USER}/")
    return [(language, block) for language, block in BLOCK.findall(text) if not block.startswith(NOT_RUN)]


@pytest.fixture(scope="session")
def clone(tmp_path_factory, text_files) -> Path:
    """The folder of a user: the project, some text, evaluation sets, and the quickstart's run."""
    folder = tmp_path_factory.mktemp("clone")
    link_project(folder)
    shutil.copytree(text_files, folder / "my_texts")
    (folder / "more_texts").mkdir()
    for path in text_files.glob("json_*.txt"):
        shutil.copy(path, folder / "more_texts")
    shutil.copy(DATA / "hellaswag.jsonl", folder / "hellaswag_val.jsonl")
    settings = "sources: {mine: my_texts/*.txt}\noutput: data/cleaned\ntasks: 1\nworkers: 1\nsteps: [MinhashDedup]\n"
    (folder / "my_clean.yaml").write_text(settings, encoding="utf-8")
    if (ROOT / "runs" / "quickstart" / "report").is_dir():  # the README's first command has been run
        for name in ("data", "runs"):
            shutil.copytree(ROOT / name / "quickstart", folder / name / "quickstart")
    else:
        run(f"accelerate launch -q training/train.py {QUICKSTART}", folder, os.environ)
    return folder


def run(script: str, folder: Path, environment: dict[str, str]) -> None:
    here = str(Path(sys.executable).parent)
    environment = {**environment, "PATH": f"{here}{os.pathsep}{environment['PATH']}", "MPLBACKEND": "agg"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(page, clone, tmp_path):
    with serve() as hub:
        environment = os.environ | hub.environment() | {"HF_HOME": str(tmp_path / "cache")}
        ran = 0
        for language, block in blocks(ROOT / page):
            if "hf auth whoami" in block:
                assert shutil.which("hf", path=str(Path(sys.executable).parent))
            script = f"python - <<'END'\n{block}END" if language == "python" else block
            run(re.sub(r"^pip install .*$", "true", script, flags=re.MULTILINE), clone, environment)
            ran += 1
        assert ran >= 2

"""The worked examples of docs/extending.md: each change applied to a copy of the project, each command run there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_MODEL
from project import PACKAGES

pytestmark = pytest.mark.docs
PAGE = ROOT / "docs" / "extending.md"
SECTION = re.compile(r"^## (An? [a-z ]+)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
SECTIONS = dict(SECTION.findall(PAGE.read_text(encoding="utf-8")))
# The quickstart's model is larger, and its data take a minute to prepare.
SMALL = [*TINY_MODEL, "--batch_tokens", "256", "--val_tokens", "512", "--sample_every", "0", "--sample_tokens", "8"]
MOST_FILES = {
    "An optimizer": 2,
    "An evaluation": 2,
    "A metric": 1,
    "A schedule": 1,
    "A data source": 2,
    "An attention kernel": 0,
}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("section", MOST_FILES)
def test_a_worked_example(section, data_folder, tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(data_folder, tmp_path / "data" / "quickstart")
    files = set()
    for change in blocks(section, "diff"):
        subprocess.run(["git", "apply", "-"], input=change, text=True, cwd=tmp_path, check=True)
        files |= set(re.findall(r"^\+\+\+ b/(\S+)", change, re.MULTILINE))
    assert len(files) <= MOST_FILES[section]
    for script in blocks(section, "python"):
        (tmp_path / script.split()[1]).write_text(script)
    (commands,) = blocks(section, "bash")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path), "ACCELERATE_USE_CPU": "true"}
    small = re.sub(r"(train\.py .*)", rf"\1 {' '.join(SMALL)}", commands)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", small], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{small}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

"""Installed versions against tested ones: setup.cfg's ranges, constraints.txt, the line at the start of a run."""

import configparser
import functools
import re
import sys

import pytest
from conftest import ROOT
from forks import begin
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
LISTS = {"install_requires": SETUP["options"]["install_requires"], **SETUP["options.extras_require"]}
REQUIREMENTS = [Requirement(line) for text in LISTS.values() for line in text.splitlines() if line]
RECORD = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
NOT_RECORDED = {"wandb"}  # which needs an account, and is tested by hand


@pytest.mark.parametrize("requirement", [r for r in REQUIREMENTS if r.name != "gpt-accelerate"], ids=lambda r: r.name)
def test_every_range_has_two_ends_and_the_record_is_the_newer(requirement):
    bounds = {bound.operator: bound.version for bound in requirement.specifier}
    assert bounds.keys() == {">=", "<="}
    assert Version(bounds[">="]) <= Version(bounds["<="])
    if requirement.name not in NOT_RECORDED:
        assert Version(RECORD[canonicalize_name(requirement.name)]) == Version(bounds["<="])


def test_the_record_serves_every_machine():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(RECORD) > 100
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "exact versions, for CPUs and GPUs alike"


def test_the_readme_installs_what_was_tested():
    text = (ROOT / "README.md").read_text()
    installs = re.findall(r"pip install -e [^&\n]*", text)
    assert len(installs) >= 3 and all("-c constraints.txt" in line for line in installs)


def put_first_on_the_path(folder: str) -> None:
    sys.path.insert(0, folder)


@pytest.mark.parametrize("version", ["0.3.0", "9.0"])
def test_a_run_says_which_library_is_outside_of_its_window(version, short_steps, tmp_path):
    info = tmp_path / f"evaluate-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: evaluate\nVersion: {version}\n")
    flags = [*short_steps, "--max_steps", "1"]
    code, text = begin(flags, tmp_path, functools.partial(put_first_on_the_path, str(tmp_path))).ended()
    assert code == 0
    window = next(requirement.specifier for requirement in REQUIREMENTS if requirement.name == "evaluate")
    lines = [line for line in text.splitlines() if line.startswith("warning:")]
    assert len(lines) == 1 and f"evaluate {version} was not tested" in lines[0]
    assert all(str(bound) in lines[0] for bound in window)


def test_a_tested_environment_is_not_warned_of(tiny_run):
    assert "was not tested" not in tiny_run.stdout

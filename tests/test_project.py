"""The shape of the project: which part imports which, and what starting up costs."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT
from project import PACKAGES

MAY_IMPORT = {
    "modeling": {"modeling"},
    "data_prep": {"data_prep"},
    "eval": {"eval", "modeling", "data_prep"},
    "training": {"training", "eval", "modeling", "data_prep"},
}
LIBRARIES = {"modeling": {"torch", "transformers"}}


def imports(path) -> set[str]:
    """All modules that a file imports, wherever it does, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        names = top_level(imports(path))
        assert names & {*PACKAGES, "benchmarks", "tests"} <= MAY_IMPORT[package], path
        if package == "data_prep":
            assert not names & {"torch", "accelerate"}, path
        if package in LIBRARIES:
            assert names - sys.stdlib_module_names - set(PACKAGES) <= LIBRARIES[package], path


def test_no_module_imports_one_that_imports_it():
    """Not within functions or for type checking either."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    graph = {}
    for name, path in files.items():
        found = imports(path)
        graph[name] = ({*found} | {one.rpartition(".")[0] for one in found}) & files.keys()
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_no_module_of_training_hides_another():
    """`accelerate launch training/train.py` puts training/ first on sys.path."""
    from importlib.metadata import packages_distributions

    known = set(sys.stdlib_module_names) | set(packages_distributions()) - set(PACKAGES)
    names = {path.stem for path in (ROOT / "training").iterdir() if path.suffix in ("", ".py")}
    assert not names & known


def test_training_starts_without_what_it_may_not_need():
    program = "import sys, training.train, training.build_run; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"torch", "accelerate", "training"} <= loaded
    assert not loaded & {"datasets", "evaluate", "matplotlib", "lm_eval", "pyarrow", "pandas"}

"""The packages of the project, the folder of benchmarks beside them, and a folder like a clone."""

from pathlib import Path

from conftest import ROOT

PACKAGES = ("modeling", "data_prep", "eval", "training")
WITH_COMMANDS = (*PACKAGES, "benchmarks")


def link_project(folder: Path) -> None:
    """Fill a folder with what a clone has, as links."""
    for path in ROOT.iterdir():
        if path.name not in ("data", "runs") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)

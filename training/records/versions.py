"""Compares installed versions with the tested ranges of setup.cfg."""

from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

_DISTRIBUTION = "gpt-accelerate"
_SETUP = Path(__file__).parents[2] / "setup.cfg"


def untested_versions() -> list[str]:
    """One line for each installed library outside of its tested range; absent libraries are skipped."""
    found = []
    for requirement in _requirements():
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            continue
        try:
            tested = requirement.specifier.contains(installed, prereleases=True)
        except (TypeError, InvalidVersion):  # of a broken installation
            tested = False
        if not tested:
            window = " and ".join(sorted(map(str, requirement.specifier), reverse=True))
            found.append(f"warning: {requirement.name} {installed} was not tested; versions {window} were (setup.cfg)")
    return list(dict.fromkeys(found))


def _requirements() -> list[Requirement]:
    """The requirements in setup.cfg of a clone, else of the installed distribution."""
    if _SETUP.is_file():
        import configparser

        parser = configparser.ConfigParser()
        parser.read(_SETUP, encoding="utf-8")
        if parser.get("metadata", "name", fallback=None) == _DISTRIBUTION:
            lines = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
            return [Requirement(line) for text in lines for line in text.splitlines() if line]
    try:
        return [Requirement(line) for line in requires(_DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return []

"""The window of versions that this project was tested with: setup.cfg's ranges, beside what is installed."""

from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion

_DISTRIBUTION = "gpt-accelerate"
_SETUP = Path(__file__).parents[2] / "setup.cfg"


def untested_versions() -> list[str]:
    """One line for each installed library that is outside of the tested window; those that are absent are not named."""
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
    """Those of setup.cfg in a clone, whose installed record may be older; else those of the installed record."""
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

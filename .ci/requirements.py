"""Print what setup.cfg requires, with other bounds, for pip's -r.

python .ci/requirements.py oldest test clients       the floor of every range, exactly
python .ci/requirements.py no_ceilings test clients  no upper bound at all
"""

import configparser
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# Wheels of torch for the CPU are not on PyPI, and its CUDA libraries are gigabytes: the floor is run by hand.
NOT_LOWERED = {"torch"}


def requirements(extras: list[str]) -> list[Requirement]:
    """The requirements of setup.cfg and of its `extras`, with those of extras that they name."""
    parser = configparser.ConfigParser()
    parser.read(Path(__file__).parents[1] / "setup.cfg")
    lines = parser["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += parser["options.extras_require"][extra].splitlines()
    found = []
    for requirement in map(Requirement, filter(None, lines)):
        if requirement.name == parser["metadata"]["name"]:
            found += requirements(sorted(requirement.extras))
        else:
            found.append(requirement)
    return list({requirement.name: requirement for requirement in found}.values())


def with_bounds(requirement: Requirement, kind: str) -> Requirement:
    """The requirement at its floor, or without its ceiling."""
    floor = next(bound.version for bound in requirement.specifier if bound.operator == ">=")
    if requirement.name in NOT_LOWERED and kind == "oldest":
        return requirement
    requirement.specifier = SpecifierSet(f"=={floor}" if kind == "oldest" else f">={floor}")
    return requirement


def main() -> None:
    kind, *extras = sys.argv[1:]
    assert kind in ("oldest", "no_ceilings"), kind
    print(*(with_bounds(requirement, kind) for requirement in requirements(extras)), sep="\n")


if __name__ == "__main__":
    main()

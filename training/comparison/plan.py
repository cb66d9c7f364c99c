"""The runs of a comparison: which settings, and how long."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.common.command_line import UserError, listed, raise_all
from data_prep.common.schema import read_yaml

if TYPE_CHECKING:
    from training.settings.config import TrainingConfig

_UNITS = {"m": "minutes", "min": "minutes", "minutes": "minutes", "tokens": "tokens", "steps": "steps"}
# The comparison decides these.
_RESERVED = (
    *("max_steps", "max_tokens", "max_minutes", "seed", "output_dir", "run_name"),
    *("resume_from_checkpoint", "auto_resume", "preflight", "push_to_hub"),
)


class Budget(NamedTuple):
    """What each run gets: minutes of training steps on this machine, tokens, or steps."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:,g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """Reads `2m`, `500k-tokens`, `800-steps` and the like (`UserError` for another form, and for nothing)."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kMG]?)[- ]?([a-z]+)", text)
    unit = _UNITS.get(match[3]) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise UserError(f"budget={text!r}: give minutes, tokens or steps, as in 2m, 500k-tokens or 800-steps")
    return Budget(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]], unit)


@dataclass
class Variant:
    """Settings that are compared with others.

    Attributes:
        arguments: of the trainer: `[CONFIG.yaml] --name value ...`.
        max_steps: length of each run; for a budget of minutes that of its configuration, until they are converted.
    """

    name: str
    arguments: list[str]
    max_steps: int = 0

    def config(self, *more: str) -> "TrainingConfig":
        """The settings of a run with more arguments (`UserError` with all problems)."""
        from training.settings.validation import load_config

        return load_config([*self.arguments, *more], 1)

    def check_run(self, folder: Path) -> None:
        """Raises `UserError` if the run of a folder has other settings than this variant."""
        if not (folder / "config.yaml").exists():
            return
        saved = read_yaml(folder / "config.yaml")
        settings = json.loads(json.dumps(self.config().to_dict()))
        expected = {name: value for name, value in settings.items() if name not in _RESERVED and value is not None}
        expected["max_steps"] = self.max_steps
        changed = [name for name, value in expected.items() if name in saved and saved[name] != value]
        if problems := [f"{name} was {saved[name]}, now {expected[name]}" for name in changed]:
            raise UserError(f"{folder} is of another comparison: {listed(problems)}; choose another --output_dir")


def make_variants(bases: list[str], vary: list[str], budget: Budget) -> list[Variant]:
    """Every combination of a base with one value of each varied setting.

    Args:
        bases: YAML files; none for the defaults.
        vary: `NAME=VALUE,VALUE,...`; a single value is that of all variants.

    Raises:
        UserError: with all problems of all variants.
    """
    grid = _grid(vary)
    length = [] if budget.unit == "minutes" else [f"--max_{budget.unit}", f"{budget.amount:.0f}"]
    variants: dict[str, Variant] = {}
    problems = []
    for base, values in itertools.product(bases or [""], itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        parts = [Path(base).stem] if len(bases) > 1 else []
        parts += [f"{name}={value}" for name, value in chosen.items() if len(grid[name]) > 1]
        name = ",".join(parts).replace("/", "_") or "base"
        arguments = [base] if base else []
        arguments += [word for setting, value in chosen.items() for word in (f"--{setting}", value)]
        if name in variants:
            problems.append(f"{name}: two variants have this name; rename a file, or leave a value out")
        variants[name] = variant = Variant(name, [*arguments, "--push_to_hub", "false"])
        try:
            variant.max_steps = variant.config(*length).max_steps
        except UserError as error:
            problems.append(f"{name}: {error}")
    raise_all(problems)
    return list(variants.values())


def _grid(vary: list[str]) -> dict[str, list[str]]:
    grid: dict[str, list[str]] = {}
    problems = []
    for word in vary:
        name, _, values = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        listed_values = values.split(",")
        if not name or not all(listed_values):
            problems.append(f"vary={word!r}: give NAME=VALUE,VALUE")
        elif name in _RESERVED:
            problems.append(f"vary={word!r}: the comparison itself sets {name}; leave it out")
        grid[name] = grid.get(name, []) + listed_values
    raise_all(problems)
    return grid

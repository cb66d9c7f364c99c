"""The runs of a comparison: which settings, seeds and budget, and what the folder says about them."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.common.command_line import UserError, listed, raise_all
from data_prep.common.files import write_text
from data_prep.common.schema import STRICT, Positive, read_json
from training.settings.config import TrainingConfig
from training.settings.validation import load_config

FILE_NAME = "comparison.json"
_UNITS = {"m": "minutes", "min": "minutes", "minutes": "minutes", "tokens": "tokens", "steps": "steps"}
# The comparison decides these.
_RESERVED = (
    *("max_steps", "max_tokens", "max_minutes", "seed", "output_dir", "run_name"),
    *("resume_from_checkpoint", "auto_resume", "preflight", "push_to_hub"),
)


@dataclass(frozen=True)
class Budget:
    """What each run gets: minutes of training steps on this machine, tokens, or steps."""

    __pydantic_config__ = STRICT

    amount: float
    unit: Literal["minutes", "tokens", "steps"]

    def __str__(self) -> str:
        return f"{self.amount:,g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """Reads `2m`, `500k-tokens`, `800-steps` and the like.

    Raises:
        UserError: for another form, and for an amount that is not positive.
    """
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kMG]?)[- ]?([a-z]+)", text)
    unit = _UNITS.get(match[3]) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise UserError(f"budget={text!r}: give minutes, tokens or steps, as in 2m, 500k-tokens or 800-steps")
    return Budget(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]], unit)  # type: ignore[arg-type]


@dataclass
class Variant:
    """Settings that are compared with others.

    Attributes:
        arguments: of the trainer: `[CONFIG.yaml] --name value ...`.
        settings: all settings that follow from them.
        max_steps: length of each run; None while a budget of minutes has not been converted.
    """

    __pydantic_config__ = STRICT

    arguments: list[str]
    settings: dict[str, Any]
    max_steps: Positive | None = None

    def config(self, *more: str) -> TrainingConfig:
        """The settings of a run with more arguments (`UserError` with all problems)."""
        return load_config([*self.arguments, *more], 1)


@dataclass
class Plan:
    """The contents of `comparison.json`: all variants that were ever compared in its folder, by name."""

    __pydantic_config__ = STRICT

    budget: Budget
    variants: dict[str, Variant] = field(default_factory=dict)

    def only(self, names: Iterable[str]) -> "Plan":
        """The plan of some of the variants."""
        return Plan(self.budget, {name: self.variants[name] for name in names})

    def save(self, folder: Path) -> None:
        write_text(folder / FILE_NAME, json.dumps(asdict(self), indent=1) + "\n")


def make_plan(bases: list[str], vary: list[str], budget: Budget) -> Plan:
    """Every combination of a base with one value of each varied setting.

    Args:
        bases: YAML files; none for the defaults.
        vary: `NAME=VALUE,VALUE,...`; a single value is that of all variants.

    Raises:
        UserError: with all problems of all variants.
    """
    grid = _grid(vary)
    several = {name for name, values in grid.items() if len(values) > 1}
    plan, problems = Plan(budget), []
    for base, values in itertools.product(bases or [""], itertools.product(*grid.values())):
        chosen = dict(zip(grid, values, strict=True))
        parts = [Path(base).stem] if len(bases) > 1 else []
        parts += [f"{name}={value}" for name, value in chosen.items() if name in several]
        name = ",".join(parts).replace("/", "_") or "base"
        arguments = [base] if base else []
        arguments += [word for setting, value in chosen.items() for word in (f"--{setting}", value)]
        arguments += ["--push_to_hub", "false"]
        if name in plan.variants:
            problems.append(f"{name}: two variants have this name; rename a file, or leave one out")
        try:
            plan.variants[name] = _variant(arguments, budget)
        except UserError as error:
            problems.append(f"{name}: {error}")
    raise_all(problems)
    return plan


def _grid(vary: list[str]) -> dict[str, list[str]]:
    grid: dict[str, list[str]] = {}
    problems = []
    for word in vary:
        name, equals, values = word.partition("=")
        name = name.lstrip("-").replace("-", "_")
        listed_values = values.split(",")
        if not equals or not name or not all(listed_values):
            problems.append(f"vary={word!r}: give NAME=VALUE,VALUE")
        elif name in _RESERVED:
            problems.append(f"vary={word!r}: the comparison itself sets {name}; leave it out")
        elif name in grid:
            problems.append(f"vary={word!r}: {name} is given twice; list all its values once")
        elif repeated := [value for value, times in Counter(listed_values).items() if times > 1]:
            problems.append(f"vary={word!r}: {repeated[0]} is given twice; leave it out once")
        grid[name] = listed_values
    raise_all(problems)
    return grid


def _variant(arguments: list[str], budget: Budget) -> Variant:
    length = {"steps": ["--max_steps", f"{budget.amount:.0f}"], "tokens": ["--max_tokens", f"{budget.amount:.0f}"]}
    variant = Variant(arguments, {})
    config = variant.config(*length.get(budget.unit, []))
    if budget.unit != "minutes":
        variant.max_steps = config.max_steps
    variant.settings = {
        name: value
        for name, value in json.loads(json.dumps(config.to_dict())).items()
        if name not in _RESERVED and value is not None
    }
    return variant


def open_plan(wanted: Plan, folder: Path) -> Plan:
    """The plan of `folder` with the wanted variants in it; those that it has already keep their lengths.

    Raises:
        UserError: if the folder holds something else, or compares by another budget or with other settings.
    """
    file = folder / FILE_NAME
    if not file.exists():
        if others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
            raise UserError(f"{folder} is not empty and holds no comparison ({others[0]}); choose another --output_dir")
        return wanted
    before = read_json(file, Plan)
    problems = []
    if before.budget != wanted.budget:
        problems.append(f"its budget is {before.budget}, not {wanted.budget}")
    for name in before.variants.keys() & wanted.variants.keys():
        old, new = before.variants[name].settings, wanted.variants[name].settings
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        problems += [f"{key} of {name} was {old.get(key)}, now {new.get(key)}" for key in changed]
        wanted.variants[name].max_steps = before.variants[name].max_steps
    if problems:
        raise UserError(f"{folder} holds another comparison: {listed(problems)}; choose another --output_dir")
    return Plan(wanted.budget, before.variants | wanted.variants)

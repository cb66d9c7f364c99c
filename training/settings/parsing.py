"""Reads the settings of a run: flags over file over preset over the run that is resumed over defaults."""

import argparse
import dataclasses
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from data_prep.common.command_line import (
    EMPTY,
    HelpFormatter,
    UserError,
    first_line,
    is_missing,
    listed,
    raise_all,
    unknown_name,
)
from data_prep.common.files import describe_path
from data_prep.common.schema import read_yaml
from eval.common.models import read_config
from modeling import PRESETS, GPTConfig, parameter_count
from training.checkpointing.storage import load_state
from training.settings.config import TrainingConfig
from training.settings.schema import MODEL_SIZES, NEWEST

_DESCRIPTION = "Train a GPT. Flags override the file, the file the preset, the preset the defaults."
_METAVARS = {int: "N", float: "X", bool: "true|false"}
_SHOWN = 60  # characters of a value
_LENGTHS = ("max", "warmup", "decay", "cooldown")  # each in steps or in tokens


def read_settings(argv: list[str], num_processes: int = 1) -> tuple[TrainingConfig, list[str]]:
    """Reads `[CONFIG.yaml] [--name value ...]`; defaults adapt to what is given and to the number of processes.

    Returns:
        The configuration, and a line for each unknown name and each value of a wrong type or out of its bounds; a
        setting with such a value has its default.

    Raises:
        UserError: for a file, a checkpoint or a model that cannot be read.
    """
    flags = list(argv)
    file = flags.pop(0) if flags and not flags[0].startswith("-") else None
    words = _split_flags(flags)
    if {"h", "help"} & words.keys():
        _help_parser().parse_args(["--help"])
    if "list_presets" in words:
        print(presets_table())
        sys.exit()
    problems: list[str] = []
    in_file = {} if file is None else _read_file(Path(file), problems)
    in_flags = _from_flags(words, problems)
    given = _over(in_file, in_flags)
    config = _make_config(given, problems)
    if not problems:
        given = _over(_inherited(config, given), given)
        config = _make_config(given, problems)
    _adapt_defaults(config, given, num_processes)
    return config, problems


def _adapt_defaults(config: TrainingConfig, given: dict[str, Any], num_processes: int) -> None:
    """Makes a batch that is not given one that the processes can share, and a warmup no longer than the run."""
    settings = config.optimizer
    if "batch_tokens" not in given:
        unit = config.least_micro_batch * config.sequence_length * num_processes
        settings.batch_tokens = max(1, round(settings.batch_tokens / unit)) * unit
    if "warmup_steps" not in given:
        settings.warmup_steps = min(settings.warmup_steps, config.max_steps)


def parse_config(argv: list[str]) -> TrainingConfig:
    """The configuration of `[CONFIG.yaml] [--name value ...]`.

    Raises:
        UserError: with every problem that `read_settings` finds.
    """
    config, problems = read_settings(argv)
    raise_all(problems)
    return config


def presets_table() -> str:
    """The published sizes, one a line, with the batch size and the learning rate for each."""
    lines = [
        f"{'preset':<12}{'parameters':>16}{'layers':>8}{'width':>7}{'heads':>7}{'context':>9}{'batch_tokens':>14}"
        f"{'learning_rate':>15}"
    ]
    for name, preset in PRESETS.items():
        config = GPTConfig(**{size: getattr(preset, size) for size in MODEL_SIZES})
        lines.append(
            f"{name:<12}{parameter_count(config):>16,}{preset.n_layer:>8}{preset.n_embd:>7}{preset.n_head:>7}"
            f"{preset.n_positions:>9,}{preset.batch_tokens:>14,}{preset.learning_rate:>15.1e}"
        )
    return "\n".join([*lines, "With GPT-2's vocabulary of 50,257, head tied; --preset NAME trains one."])


def saved_progress(checkpoint: Path) -> tuple[int, int]:
    """The step and the position, in sequences, of a checkpoint.

    Raises:
        UserError: for a folder that is not a checkpoint.
    """
    try:
        state = load_state(checkpoint)
    except UserError as error:
        kind = describe_path(checkpoint)
        reason = first_line(error.__cause__ or error) if kind in (None, "a model") else f"it is {kind}"
        raise UserError(f"resume_from_checkpoint={str(checkpoint)!r} is not a checkpoint ({reason})") from error
    return state.step, state.position


@cache
def _types() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """The group and the possible types of each setting, None left out."""
    found = {}
    for group in dataclasses.fields(TrainingConfig):
        for name, hint in get_type_hints(cast(type, group.type)).items():
            kinds = get_args(hint) if get_origin(hint) not in (list, Literal, None) else (hint,)
            found[name] = group.name, tuple(kind for kind in kinds if kind is not type(None))
    return found


def _is_list(name: str) -> bool:
    return any(get_origin(kind) is list for kind in _types()[name][1])


def _help_parser() -> argparse.ArgumentParser:
    """The parser that prints `--help`; values are read by `_make_config`, as those of a file are."""
    parser = argparse.ArgumentParser(
        prog="accelerate launch training/train.py",
        usage="%(prog)s [CONFIG.yaml] [--name value ...]",
        description=_DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--list_presets", action="store_true", help="show the published sizes, and exit")
    for group in dataclasses.fields(TrainingConfig):
        section = parser.add_argument_group(group.name)
        for setting in dataclasses.fields(cast(type, group.type)):
            words: list[str] = []
            for kind in _types()[setting.name][1]:
                choices = get_args(kind) if get_origin(kind) is Literal else ()
                words += map(str, choices or [_METAVARS.get(kind, setting.name.upper())])
            section.add_argument(
                f"--{setting.name}",
                metavar="|".join(words),
                nargs="+" if _is_list(setting.name) else None,
                default=_default(setting),
                help=setting.metadata["help"],
            )
    return parser


def _default(setting: dataclasses.Field[Any]) -> Any:
    factory = setting.default_factory
    return setting.default if factory is dataclasses.MISSING else factory()


def _split_flags(flags: list[str]) -> dict[str, list[str]]:
    """The words that follow each flag; of a flag that is given twice, the last."""
    words: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in flags:
        if word.startswith("--") or word == "-h":
            name, _, value = word.lstrip("-").partition("=")
            current = words[name.replace("-", "_")] = [value] if "=" in word else []
        elif current is None:
            raise UserError(unknown_name(word, ()))
        else:
            current.append(word)
    return words


def _from_flags(words: dict[str, list[str]], problems: list[str]) -> dict[str, Any]:
    """The settings of a command line: lists, single words, and True for a flag without a value."""
    values: dict[str, Any] = {}
    for name, given in words.items():
        if any(is_missing(name, word) for word in given):
            problems.append(f"--{name}: {EMPTY}")
        elif name not in _types():
            problems.append(_unknown(f"--{name}"))
        elif _is_list(name):
            values[name] = given
        elif len(given) > 1:
            problems.append(f"--{name} takes one value, not {len(given)}: {' '.join(given)}")
        elif given:
            values[name] = given[0]
        elif name == "resume_from_checkpoint":
            values[name] = NEWEST
        elif bool in _types()[name][1]:
            values[name] = True
        else:
            problems.append(f"--{name} needs a value")
    return values


def _unknown(option: str) -> str:
    dashes = "--" if option.startswith("--") else ""
    return unknown_name(option, [f"{dashes}{name}" for name in (*_types(), "list_presets")])


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    """The settings of a file; those that are null count as not given."""
    try:
        settings = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if value is None:
            continue
        if name not in _types():
            problems.append(_unknown(name))
        elif value is True and name == "resume_from_checkpoint":
            values[name] = NEWEST
        elif isinstance(value, bool) and bool not in _types()[name][1]:
            problems.append(f"{name}={value}: it is not a setting of true or false")
        else:
            values[name] = [value] if _is_list(name) and not isinstance(value, list) else value
    return values


def _over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Settings with others over them. `output_dir` and `run_name` name one folder: the upper one counts."""
    replaced = {"run_name"} if "output_dir" in upper else {"output_dir"} if "run_name" in upper else set()
    # A length in tokens takes precedence over one in steps: a lower one must not hide what is asked for.
    replaced |= {f"{length}_tokens" for length in _LENGTHS if f"{length}_steps" in upper}
    return {name: value for name, value in lower.items() if name not in replaced} | upper


@cache
def _adapter() -> TypeAdapter[TrainingConfig]:
    return TypeAdapter(TrainingConfig)


def _make_config(values: dict[str, Any], problems: list[str]) -> TrainingConfig:
    """The configuration of flat `values`, checked against types and bounds; wrong values get the default."""
    groups: dict[str, dict[str, Any]] = {group.name: {} for group in dataclasses.fields(TrainingConfig)}
    for name, value in values.items():
        groups[_types()[name][0]][name] = value
    preset = values.get("preset")
    try:
        config = _adapter().validate_python(groups)
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}
        for one in error.errors(include_url=False):
            wrong.setdefault(str(one["loc"][1]), []).append(one["msg"].removeprefix("Input "))
        for name, reasons in wrong.items():
            value = repr(values[name])
            shown = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
            problems.append(f"{name}={shown} {' or '.join(dict.fromkeys(reasons))}")
        return _make_config({name: value for name, value in values.items() if name not in wrong}, problems)
    if preset is not None and preset not in PRESETS:
        problems.append(f"preset: {unknown_name(preset, PRESETS)}; known: {', '.join(PRESETS)}")
    return config


def _inherited(checked: TrainingConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run to resume or to branch off from, of a preset, and of the model to start from."""
    values: dict[str, Any] = {}
    checkpoint = checked.run.resume_from_checkpoint
    if checkpoint == NEWEST:
        file = checked.run_folder / "config.yaml"
        values |= _from_run(file) if file.exists() else {}
    elif checkpoint is not None:
        values |= _from_parent(Path(checkpoint), checked, given)
    if checked.model.preset is not None:  # GPT-3's recipe
        values = {"optim": "adamw"} | values | dataclasses.asdict(PRESETS[checked.model.preset])
    if checked.model.model_name_or_path is not None and checkpoint is None:
        values |= _sizes_of(checked.model.model_name_or_path)
    return values


def _from_run(file: Path) -> dict[str, Any]:
    """The settings in a run's own `config.yaml`, which another version may have written (`UserError`)."""
    problems: list[str] = []
    values = _read_file(file, problems)
    _make_config(values, problems)
    if problems:
        raise UserError(f"{file}: {listed(problems)}; it was written by another version, or changed")
    return values


def _from_parent(checkpoint: Path, checked: TrainingConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that `checkpoint` is of, with a length that ends after the cooldown if one is given."""
    step, position = saved_progress(checkpoint)
    values = _from_run(checkpoint.resolve().parents[1] / "config.yaml")
    for name in ("push_to_hub", "hub_model_id"):  # the repository of the other run
        values.pop(name, None)
    if "cooldown_tokens" in given and "max_tokens" not in given:
        length = _make_config(values, []).sequence_length
        values["max_tokens"] = position * length + (checked.optimizer.cooldown_tokens or 0)
    elif "cooldown_steps" in given and "max_steps" not in given:
        values.pop("max_tokens", None)
        values["max_steps"] = step + checked.optimizer.cooldown_steps
    return values


def _sizes_of(name: str) -> dict[str, Any]:
    """The sizes of a GPT-2 in a folder or on the Hub, which AdamW has trained."""
    try:
        config = read_config(name)
    except UserError as error:
        raise UserError(f"model_name_or_path={name!r}: {first_line(error.__cause__ or error)}") from error
    return {size: getattr(config, size) for size in MODEL_SIZES} | {"optim": "adamw"}

"""Reads the settings of a run: flags over file over preset over the run that is resumed over defaults."""

import argparse
import dataclasses
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from data_prep.common.command_line import ArgumentParser, UserError, first_line, listed, raise_all, unknown_name
from data_prep.common.files import describe_path
from data_prep.common.schema import read_yaml
from modeling.presets import PRESETS, parameter_count
from training.checkpointing.storage import load_state
from training.settings.config import TrainingConfig
from training.settings.schema import MODEL_SIZES, NEWEST

_DESCRIPTION = "Train a GPT. Flags override the file, the file the preset, the preset the defaults."
_METAVARS = {int: "N", float: "X", bool: "true|false"}
_SHOWN = 60  # characters of a value


def read_settings(argv: list[str], num_processes: int = 1) -> tuple[TrainingConfig, list[str]]:
    """Reads `[CONFIG.yaml] [--name value ...]`; defaults adapt to what is given and to the number of processes.

    Returns:
        The configuration, and a line for each unknown name and each value of a wrong type or out of its bounds; a
        setting with such a value has its default.

    Raises:
        UserError: for a flag without its value, and a file, a checkpoint or a model that cannot be read.
    """
    flags = list(argv)
    file = flags.pop(0) if flags and not flags[0].startswith("-") else None
    problems: list[str] = []
    in_flags = _read_flags(flags, problems)
    in_file = {} if file is None else _read_file(Path(file))
    given = _over(in_file, in_flags)
    config = _make_config(given, problems)
    if not problems:
        given = _over(_inherited(config, given), given)
        config = _make_config(given, problems)
    return _adapt_defaults(config, given, num_processes), problems


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
        lines.append(
            f"{name:<12}{parameter_count(preset):>16,}{preset.n_layer:>8}{preset.n_embd:>7}{preset.n_head:>7}"
            f"{preset.n_positions:>9,}{preset.batch_tokens:>14,}{preset.learning_rate:>15.1e}"
        )
    return "\n".join([*lines, "With GPT-2's vocabulary of 50,257, head tied; --preset NAME trains one."])


def _adapt_defaults(config: TrainingConfig, given: dict[str, Any], num_processes: int) -> TrainingConfig:
    """Learning rates for the optimizer, a batch that the processes can share, and a warmup no longer than the run."""
    adapted: dict[str, Any] = {}
    if config.optimizer.optim != "muon":
        adapted = {"learning_rate": 3e-3, "muon_learning_rate": None}
    elif "learning_rate" in given:
        adapted = {"muon_learning_rate": None}
    unit = config.least_micro_batch * config.sequence_length * num_processes
    adapted["batch_tokens"] = max(1, round(config.optimizer.batch_tokens / unit)) * unit
    config = config.replace(**{name: value for name, value in adapted.items() if name not in given})
    if "warmup_steps" not in given:
        config = config.replace(warmup_steps=min(config.optimizer.warmup_steps, config.max_steps))
    return config


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
    return name in _types() and any(get_origin(kind) is list for kind in _types()[name][1])


def _parser() -> ArgumentParser:
    """The parser of flags into words; `_make_config` checks them, as it does the values of a file."""
    parser = ArgumentParser("accelerate launch training/train.py", _DESCRIPTION)
    parser.usage = "%(prog)s [CONFIG.yaml] [--name value ...]"
    parser.exit_on_error = False
    parser.add_option("list_presets", action="store_true", help="show the published sizes, and exit")
    for group in dataclasses.fields(TrainingConfig):
        section = parser.add_argument_group(group.name)
        for setting in dataclasses.fields(cast(type, group.type)):
            name, kinds = setting.name, _types()[setting.name][1]
            words: list[str] = []
            for kind in kinds:
                choices = get_args(kind) if get_origin(kind) is Literal else ()
                words += map(str, choices or [_METAVARS.get(kind, name.upper())])
            alone: dict[str, Any] = {"nargs": "+"} if _is_list(name) else {}
            if bool in kinds or name == "resume_from_checkpoint":
                alone = {"nargs": "?", "const": True if bool in kinds else NEWEST}
            spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
            factory, text = setting.default_factory, setting.metadata["help"]
            default = setting.default if factory is dataclasses.MISSING else factory()
            section.add_argument(*spellings, metavar="|".join(words), default=default, help=text, **alone)
    return parser


def _read_flags(flags: list[str], problems: list[str]) -> dict[str, Any]:
    """The settings of a command line: lists, single words, and True for a flag that can stand alone."""
    parser = _parser()
    try:
        parsed, rest = parser.parse_known_args(flags, argparse.Namespace(**dict.fromkeys(_types())))
    except argparse.ArgumentError as error:
        raise UserError(f"{str(error.argument_name).partition('/')[0]}: {error.message}") from error
    if parsed.list_presets:
        print(presets_table())
        sys.exit()
    unknown = [word.partition("=")[0] for word in rest if word.startswith("--")] or rest
    problems += [unknown_name(word, parser._option_string_actions) for word in unknown]
    del parsed.list_presets
    return {name: value for name, value in vars(parsed).items() if value is not None}


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a file; those that are null count as not given."""
    try:
        settings = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    if settings.get("resume_from_checkpoint") is True:
        settings["resume_from_checkpoint"] = NEWEST
    return {
        name: [value] if _is_list(name) and not isinstance(value, list) else value
        for name, value in settings.items()
        if value is not None
    }


def _over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Settings with others over them. `output_dir` and `run_name` name one folder: the upper one counts."""
    replaced = {"run_name"} if "output_dir" in upper else {"output_dir"} if "run_name" in upper else set()
    # A length in tokens takes precedence over one in steps: a lower one must not hide what is asked for.
    replaced |= {f"{length}_tokens" for length in ("max", "warmup") if f"{length}_steps" in upper}
    return {name: value for name, value in lower.items() if name not in replaced} | upper


@cache
def _adapter() -> TypeAdapter[TrainingConfig]:
    return TypeAdapter(TrainingConfig)


def _make_config(values: dict[str, Any], problems: list[str]) -> TrainingConfig:
    """The configuration of flat `values`, checked against types and bounds; wrong values get the default."""
    groups: dict[str, dict[str, Any]] = {group.name: {} for group in dataclasses.fields(TrainingConfig)}
    known: dict[str, Any] = {}
    for name, value in values.items():
        if name not in _types():
            problems.append(unknown_name(name, _types()))
        elif isinstance(value, bool) and bool not in _types()[name][1]:
            problems.append(f"{name}={value}: it is not a setting of true or false")
        else:
            groups[_types()[name][0]][name] = known[name] = value
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
        return _make_config({name: value for name, value in known.items() if name not in wrong}, problems)
    if (preset := config.model.preset) is not None and preset not in PRESETS:
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
        values |= _from_parent(checkpoint, given, checked.optimizer.cooldown_steps)
    if checked.model.preset is not None:  # GPT-3's recipe
        values = {"optim": "adamw"} | values | dataclasses.asdict(PRESETS[checked.model.preset])
    if checked.model.model_name_or_path is not None and checkpoint is None:
        values |= _sizes_of(checked.model.model_name_or_path)
    return values


def _from_run(file: Path) -> dict[str, Any]:
    """The settings in a run's own `config.yaml`. Those that this version does not know are ignored, with a warning:
    `resumed_state` refuses to resume with another result.

    Raises:
        UserError: for a wrong value.
    """
    values, problems = _read_file(file), list[str]()
    if (unknown := sorted(values.keys() - _types().keys())) and os.environ.get("RANK", "0") == "0":
        ignored = ", ".join(f"{name}={values[name]}" for name in unknown)
        print(f"warning: {file}: ignored {ignored}, which this version does not have")
    values = {name: value for name, value in values.items() if name in _types()}
    _make_config(values, problems)
    if problems:
        raise UserError(f"{file}: {listed(problems)}; it was written by another version, or changed")
    return values


def _from_parent(checkpoint: str, given: dict[str, Any], cooldown_steps: int) -> dict[str, Any]:
    """The settings of the run that `checkpoint` is of, with a length that ends after the cooldown if one is given."""
    folder = Path(checkpoint)
    try:
        step = load_state(folder).step
    except UserError as error:
        kind = describe_path(folder)
        reason = first_line(error.__cause__ or error) if kind in (None, "a model") else f"it is {kind}"
        raise UserError(f"resume_from_checkpoint={checkpoint!r} is not a checkpoint ({reason})") from error
    values = _from_run(folder.resolve().parents[1] / "config.yaml")
    for name in ("push_to_hub", "hub_model_id"):  # the repository of the other run
        values.pop(name, None)
    if "cooldown_steps" in given and "max_steps" not in given:
        values.pop("max_tokens", None)
        values["max_steps"] = step + cooldown_steps
    return values


def _sizes_of(name: str) -> dict[str, Any]:
    """The sizes of a GPT-2 in a folder or on the Hub, which AdamW has trained."""
    from eval.common.models import read_config  # loads transformers

    try:
        config = read_config(name)
    except UserError as error:
        raise UserError(f"model_name_or_path={name!r}: {first_line(error.__cause__ or error)}") from error
    return {size: getattr(config, size) for size in MODEL_SIZES} | {"optim": "adamw"}

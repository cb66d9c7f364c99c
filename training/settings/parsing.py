"""Reading the settings of a run: flags over file over preset over defaults."""

import argparse
import dataclasses
import re
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from data_prep.common.command_line import (
    EMPTY,
    HelpFormatter,
    UserError,
    first_line,
    is_missing,
    raise_all,
    unknown_name,
)
from data_prep.common.schema import read_yaml
from eval.common.models import read_config
from modeling import PRESETS, GPTConfig, parameter_count
from training.checkpointing.storage import load_state
from training.settings.schema import MODEL_SIZES, NEWEST, ModelSettings, RunSettings, TrainingConfig

_Option = list[str]  # "--name" and its values


class _ListPresets(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(presets_table())
        parser.exit()


class _Parser(HfArgumentParser):
    def __init__(self) -> None:
        groups = [field.type for field in dataclasses.fields(TrainingConfig)]
        super().__init__(
            groups,
            prog="accelerate launch training/train.py",
            usage="%(prog)s [CONFIG.yaml] [--name value ...]",
            description="Train a GPT. Flags go over the file, the file over the preset, the preset over the defaults.",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        nowhere = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument(
            "--list_presets", action=_ListPresets, nargs=0, help="show the published sizes, and exit", **nowhere
        )
        self._option_string_actions["--micro_batch"].type = number_or_auto

    def error(self, message: str) -> None:
        raise UserError(message)


def number_or_auto(word: str) -> int | str:
    return word if word == "auto" else int(word)


def presets_table() -> str:
    """The published sizes, one a line, with the batch and the learning rate to train each by."""
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


def parse_config(argv: list[str]) -> TrainingConfig:
    """Read `[CONFIG.yaml] [--name value ...]`.

    A file, a preset and what a checkpoint says are turned into flags that stand before those of the command line: one
    reader for all, and the last word wins.

    Raises:
        UserError: with every unknown name and every value of the wrong type.
    """
    parser = _Parser()
    flags = list(argv)
    settings = _read_yaml(flags.pop(0)) if flags and not flags[0].startswith("-") else {}
    options = _to_options(settings) + _split_options(flags)
    _check_options(parser, options)
    given = {option[0].removeprefix("--").replace("-", "_"): option[1:] for option in options}
    options = _said_by_checkpoints(parser, given) + options
    words = [word for option in options for word in option]
    return TrainingConfig(*parser.parse_args_into_dataclasses(words, look_for_args_file=False))


def saved_progress(checkpoint: Path) -> tuple[int, int]:
    """The step and the position, in sequences, that a checkpoint was saved at.

    Raises:
        UserError: for a folder that is none.
    """
    try:
        state = load_state(checkpoint)
    except UserError as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(f"resume={str(checkpoint)!r} is not a checkpoint to resume from ({reason})") from error
    return state.step, state.position


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        return read_yaml(Path(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error


def _to_options(settings: dict[str, Any]) -> list[_Option]:
    return [_to_option(name, value) for name, value in settings.items() if value not in (None, [])]


def _to_option(name: str, value: Any) -> _Option:
    if name in ("help", "h", "list_presets"):
        raise UserError(f"{name} is no setting")
    if value is True:
        return [f"--{name}"]
    try:
        words = [str(one) for one in (value if isinstance(value, list) else [value])]
        "".join(words).encode()
    except ValueError as error:  # half of a surrogate pair, a number of thousands of digits
        raise UserError(f"{name}: {first_line(error)}") from error
    if flags := [word for word in words if re.match(r"-\D", word) and " " not in word and word not in ("-inf", "-nan")]:
        raise UserError(f"{name}={flags[0]!r}: a value cannot begin with '-', as an option does")
    return [f"--{name}", *words]


def _split_options(flags: list[str]) -> list[_Option]:
    """The words of a command line, grouped into options with their values."""
    options: list[_Option] = []
    for word in flags:
        if word.startswith("--") or word == "-h" or not options:
            options.append(word.split("=", 1))
        else:
            options[-1].append(word)
    return options


def _check_options(parser: _Parser, options: list[_Option]) -> None:
    problems: list[str] = []
    for option in options:
        if any(is_missing(option[0].removeprefix("--").replace("-", "_"), word) for word in option[1:]):
            problems.append(f"{option[0]}: {EMPTY}")
            continue
        try:
            *_, unknown = parser.parse_args_into_dataclasses(option, True, look_for_args_file=False)
        except UserError as error:
            problems.append(f"{option[0]}: {str(error).partition(': ')[2]}")  # argparse names both its spellings
            continue
        if option[0] in unknown:
            unknown = option[:1]
        problems += [unknown_name(word, parser._option_string_actions) for word in unknown]
        if option[0] == "--preset" and len(option) == 2 and option[1] not in PRESETS:
            problems.append(f"--preset: {unknown_name(option[1], PRESETS)}; known: {', '.join(PRESETS)}")
    raise_all(problems)


def _said_by_checkpoints(parser: _Parser, given: dict[str, list[str]]) -> list[_Option]:
    """What a preset, the run to resume or to branch off from and the model to begin from say of the settings."""
    options: list[_Option] = []
    if "resume" in given:
        checkpoint = next(iter(given["resume"]), NEWEST)
        if checkpoint == NEWEST:
            options += _of_run(parser, given)
        else:
            options += _of_branch(parser, Path(checkpoint), given)
    if preset := given.get("preset"):
        options += _to_options(dataclasses.asdict(PRESETS[preset[0]]))
    if (model := given.get("init_from")) and "resume" not in given:
        options += _to_options(_sizes_of(model[0]))
    return options


def _checked_options(parser: _Parser, settings: dict[str, Any], file: Path) -> list[_Option]:
    """The options of a run's own settings, which another version may have written (`UserError`)."""
    options = _to_options(settings)
    try:
        _check_options(parser, options)
    except UserError as error:
        raise UserError(f"{file}: {error}; it was written by another version, or changed") from error
    return options


def _of_run(parser: _Parser, given: dict[str, list[str]]) -> list[_Option]:
    """The settings of the run itself, so that nothing but its name has to be repeated."""
    run = RunSettings()
    place = [(given.get(name) or [getattr(run, name)])[0] for name in ("runs_dir", "run_name")]
    file = Path(*place) / "config.yaml"
    return _checked_options(parser, _read_yaml(file), file) if file.exists() else []


def _of_branch(parser: _Parser, checkpoint: Path, given: dict[str, list[str]]) -> list[_Option]:
    """The settings of the run that `checkpoint` is of, ended after the cooldown if one is asked for."""
    step, position = saved_progress(checkpoint)
    file = checkpoint.resolve().parents[1] / "config.yaml"
    settings = _read_yaml(file)
    options = _checked_options(parser, settings, file)
    options = [option for option in options if option[0] != "--push_to_hub"]  # where the other run is published
    length = settings.get("sequence_length") or settings.get("n_positions") or ModelSettings().n_positions
    if "cooldown_tokens" in given and "max_tokens" not in given:
        options.append(["--max_tokens", str(position * length + int(given["cooldown_tokens"][0]))])
    elif "cooldown_steps" in given and "max_steps" not in given:
        options = [option for option in options if option[0] != "--max_tokens"]
        options.append(["--max_steps", str(step + int(given["cooldown_steps"][0]))])
    return options


def _sizes_of(name: str) -> dict[str, int]:
    """The sizes of a GPT-2 in a folder or on the Hub."""
    try:
        config = read_config(name)
    except UserError as error:
        raise UserError(f"init_from={name!r}: {first_line(error.__cause__)}") from error
    return {size: getattr(config, size) for size in MODEL_SIZES}

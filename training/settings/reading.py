"""Reads the settings of a run: flags over file over preset over the run that is resumed over defaults.

All problems are reported at once, before anything is loaded.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from data_prep.common.command_line import ArgumentParser, UserError, first_line, listed, raise_all, unknown_name
from data_prep.common.files import describe_path
from data_prep.common.hub import is_on_hub, repository_problem
from data_prep.common.schema import read_yaml
from eval.common.launch import launch_problems, on_cpu, processes_launched, uses_fsdp
from modeling.presets import PRESETS, parameter_count
from training.checkpointing.store import load_state
from training.settings.schema import MODEL_SIZES, NEWEST, QUICKSTART_DATA, TrainingConfig

_DESCRIPTION = "Train a GPT. Flags override the file, the file the preset, the preset the defaults."
_METAVARS = {int: "N", float: "X", bool: "true|false"}
_MAX_SHOWN = 60  # characters of a value
_adapter: Any = cache(TypeAdapter)


def read_config() -> TrainingConfig:
    """Reads the settings of this process's command line, as `load_config`; the first rank prints errors for all."""
    try:
        return load_config(sys.argv[1:], processes_launched())
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)
        raise


def load_config(argv: list[str], num_processes: int) -> TrainingConfig:
    """The configuration of `[CONFIG.yaml] [--name value ...]`, checked before anything is loaded. Raises `UserError`
    with every problem, each with its value, its bound and the remedy."""
    config, problems = _read(argv, num_processes)
    if not problems:  # with a wrong value replaced by its default, messages about sizes and lengths would be wrong too
        problems += _size_problems(config)
        problems += list(_batch_problems(config, num_processes)) or schedule_problems(config)
    problems += launch_problems()
    problems += _device_and_data_problems(config, num_processes)
    problems += _evaluation_problems(config, num_processes)
    known = config.to_dict()
    problems += [f"override: {unknown_name(name, known)}" for name in config.run.override if name not in known]
    problems += _folder_problems(config)
    raise_all(problems)
    return config


def parse_config(argv: list[str]) -> TrainingConfig:
    """As `load_config`, for one process; checks only names, types and bounds."""
    config, problems = _read(argv, 1)
    raise_all(problems)
    return config


def _read(argv: list[str], num_processes: int) -> tuple[TrainingConfig, list[str]]:
    """Returns the configuration and the problems with names, types and bounds; a wrong value is replaced by its
    default. Raises `UserError` for a flag without its value, and an unreadable file, checkpoint or model."""
    flags = list(argv)
    file = flags.pop(0) if flags and not flags[0].startswith("-") else None
    problems: list[str] = []
    in_flags = _read_flags(flags, problems)
    given = _over({} if file is None else _read_file(Path(file)), in_flags)
    config = _make_config(given, problems)
    if not problems:
        given = _over(_inherited(config, given), given)
        config = _make_config(given, problems)
    return _adapt_defaults(config, given, num_processes), problems


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
            types = get_args(hint) if get_origin(hint) not in (list, Literal, None) else (hint,)
            found[name] = group.name, tuple(one for one in types if one is not type(None))
    return found


def _is_list(name: str) -> bool:
    return name in _types() and any(get_origin(one) is list for one in _types()[name][1])


def _parser() -> ArgumentParser:
    """The parser of flags into words; `_make_config` checks them like the values of a file."""
    parser = ArgumentParser("accelerate launch training/train.py", _DESCRIPTION)
    parser.usage = "%(prog)s [CONFIG.yaml] [--name value ...]"
    parser.exit_on_error = False
    parser.add_option("list_presets", action="store_true", help="show the published sizes, and exit")
    for group in dataclasses.fields(TrainingConfig):
        section = parser.add_argument_group(group.name)
        for setting in dataclasses.fields(cast(type, group.type)):
            name, types = setting.name, _types()[setting.name][1]
            words: list[str] = []
            for one in types:
                choices = get_args(one) if get_origin(one) is Literal else ()
                words += map(str, choices or [_METAVARS.get(one, name.upper())])
            arity: dict[str, Any] = {"nargs": "+"} if _is_list(name) else {}
            if bool in types or name == "resume_from_checkpoint":
                arity = {"nargs": "?", "const": True if bool in types else NEWEST}
            spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
            factory, text = setting.default_factory, setting.metadata["help"]
            default = setting.default if factory is dataclasses.MISSING else factory()
            section.add_argument(*spellings, metavar="|".join(words), default=default, help=text, **arity)
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
    return {name: value for name in _types() if (value := getattr(parsed, name)) is not None}


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
        config: TrainingConfig = _adapter(TrainingConfig).validate_python(groups)
    except ValidationError as error:
        wrong: dict[str, list[str]] = {}
        for one in error.errors(include_url=False):
            wrong.setdefault(str(one["loc"][1]), []).append(one["msg"].removeprefix("Input "))
        for name, reasons in wrong.items():
            value = repr(values[name])
            shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
            problems.append(f"{name}={shown} {' or '.join(dict.fromkeys(reasons))}")
        return _make_config({name: value for name, value in known.items() if name not in wrong}, problems)
    if (preset := config.model.preset) is not None and preset not in PRESETS:
        problems.append(f"preset: {unknown_name(preset, PRESETS)}; known: {', '.join(PRESETS)}")
    return config


def _inherited(checked: TrainingConfig, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run to resume or to branch off from, of a preset, and of the model to start from."""
    values: dict[str, Any] = {}
    checkpoint, name = checked.run.resume_from_checkpoint, checked.model.model_name_or_path
    if checkpoint == NEWEST:
        file = checked.run_folder / "config.yaml"
        values |= _from_run(file) if file.exists() else {}
    elif checkpoint is not None:
        values |= _from_parent(checkpoint, given, checked.optimizer.cooldown_steps)
    if checked.model.preset is not None:  # GPT-3's recipe
        values = {"optim": "adamw"} | values | dataclasses.asdict(PRESETS[checked.model.preset])
    if name is not None and checkpoint is None:
        from eval.common.models import read_config as read_model_config  # loads transformers

        try:
            model = read_model_config(name)
        except UserError as error:
            raise UserError(f"model_name_or_path={name!r}: {first_line(error.__cause__ or error)}") from error
        values |= {size: getattr(model, size) for size in MODEL_SIZES} | {"optim": "adamw"}
    return values


def _from_run(file: Path) -> dict[str, Any]:
    """The settings in a run's own `config.yaml` (`UserError` for a wrong value). Those that this version does not know
    are ignored, with a warning: `resumed_state` refuses to resume with another result."""
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
    """The settings of the run that `checkpoint` is of; its length ends after the cooldown if one is given."""
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


def _size_problems(config: TrainingConfig) -> Iterator[str]:
    model, length, val_tokens = config.model, config.sequence_length, config.evaluation.val_tokens
    if model.n_embd % model.n_head:
        yield f"n_embd={model.n_embd} is not a multiple of n_head={model.n_head}; choose a divisor"
    if length > model.n_positions:
        yield f"sequence_length={length} is longer than n_positions={model.n_positions}; lower it, or raise the other"
    if val_tokens < length:
        yield f"val_tokens={val_tokens} is less than one sequence of {length}; raise it"


def _batch_problems(config: TrainingConfig, num_processes: int) -> Iterator[str]:
    settings, micro, length = config.optimizer, config.least_micro_batch, config.sequence_length
    unit, batch, start = micro * length * num_processes, settings.batch_tokens, settings.batch_ramp_start
    for name, size in {"batch_tokens": batch, "batch_ramp_start": start}.items():
        if size is not None and size % unit:
            nearest = " or ".join(f"{count * unit}" for count in (size // unit, size // unit + 1) if count)
            yield (
                f"{name}={size} is not a multiple of per_device_train_batch_size x sequence_length x processes = "
                f"{micro} x {length} x {num_processes} = {unit}; the nearest sizes that are: {nearest}"
            )
    if (start is not None) != ((ramp := settings.batch_ramp_tokens) > 0):
        yield f"batch_ramp_tokens={ramp} and batch_ramp_start={start} make a ramp together; give both or neither"
    if start is not None and batch % start:
        yield f"batch_tokens={batch} is not a multiple of batch_ramp_start={start}; choose a start that divides it"


def schedule_problems(config: TrainingConfig) -> Iterator[str]:
    """Problems with the lengths of the schedule and of the batch ramp."""
    settings, schedule = config.optimizer, config.schedule
    unit, end = schedule.unit, f"max_{schedule.unit}={schedule.total}"
    warmup, name = f"warmup_{unit}={schedule.warmup}", schedule.name
    if (ramp := settings.batch_ramp_tokens) > (tokens := config.batch_plan.tokens(config.max_steps)):
        yield f"batch_ramp_tokens={ramp} exceeds the {tokens} tokens of the run; shorten the ramp or lengthen the run"
    if schedule.warmup > schedule.total:
        yield f"{warmup} exceeds {end}; warm up for fewer"
    if (decay := settings.decay_tokens) is not None:
        if name not in ("cosine", "linear"):
            yield f"decay_tokens does nothing under lr_scheduler_type={name!r}; use cosine or linear, or leave it"
        elif not schedule.warmup <= decay <= schedule.total:
            yield (
                f"decay_tokens={decay} must lie between the warmup's {schedule.warmup} and {end}, as it counts from "
                f"the beginning of the run"
            )
    cooldown = f"cooldown_steps={settings.cooldown_steps}"
    if schedule.cooldown and name != "wsd":
        yield f"{cooldown} does nothing under lr_scheduler_type={name!r}; use --lr_scheduler_type wsd"
    elif schedule.warmup <= schedule.total < schedule.warmup + schedule.cooldown:
        yield (
            f"{cooldown} and {warmup} exceed {end}; to cool down from a checkpoint, name it with "
            f"--resume_from_checkpoint"
        )
    if settings.muon_learning_rate is not None and settings.optim != "muon":
        yield f"muon_learning_rate does nothing under optim={settings.optim!r}; use --optim muon"


def _device_and_data_problems(config: TrainingConfig, num_processes: int) -> Iterator[str]:
    folders, weights, attention = config.data.data, config.data.data_weights, config.model.attn_implementation
    if (compression := config.devices.gradient_compression) != "none":
        if num_processes == 1:
            yield f"gradient_compression={compression!r} does nothing in a single process; use none"
        elif uses_fsdp():
            yield f"gradient_compression={compression!r} is for data-parallel processes, not FSDP; use none"
        elif compression == "bf16" and on_cpu():
            yield "gradient_compression='bf16' needs NCCL; use fp16"
    for folder in folders:
        if folder != QUICKSTART_DATA and not is_on_hub(folder) and not Path(folder).is_dir():
            yield f"data={folder!r}: no such folder; prepare one with python -m data_prep.prepare"
    if len(set(folders)) != len(folders):
        yield f"data={folders} names a folder twice; give it a larger weight instead"
    if weights is not None and len(weights) != len(folders):
        yield f"data_weights={weights}: {len(weights)} for {len(folders)} data folders; give one for each"
    if config.data.document_mask and attention.startswith("flash"):
        yield f"document_mask does not work with attn_implementation={attention!r}; use sdpa or flex_attention"


def _evaluation_problems(config: TrainingConfig, num_processes: int) -> Iterator[str]:
    settings, tracker, hub = config.evaluation, config.logging.report_to, config.hub
    if settings.hellaswag_data is not None and not Path(settings.hellaswag_data).is_file():
        yield f"hellaswag_data={settings.hellaswag_data!r}: no such file; leave it out to download it"
    if settings.lm_eval_every and find_spec("lm_eval") is None:
        yield 'lm_eval_every needs the harness; pip install "lm-eval[hf]"'
    if settings.lm_eval_every and (limit := settings.lm_eval_limit) is not None and limit < num_processes:
        yield f"lm_eval_limit={limit} leaves some of {num_processes} processes without an item"
    if tracker not in ("none", "all") and find_spec(tracker) is None:
        yield f"report_to={tracker!r} is not installed; pip install {tracker}"
    if hub.push_to_hub and hub.hub_model_id is None:
        yield "push_to_hub needs the name of a repository; add --hub_model_id USER/NAME"
    elif hub.push_to_hub and os.environ.get("RANK", "0") == "0":  # this rank uploads
        yield from filter(None, [repository_problem("hub_model_id", str(hub.hub_model_id))])


def _folder_problems(config: TrainingConfig) -> Iterator[str]:
    folder = config.run_folder
    setting = f"run_name={config.run_name!r}" if config.run.output_dir is None else f"output_dir={str(folder)!r}"
    name = config.run_name if config.run.output_dir is None else folder.name
    if not name.strip() or name.startswith(".") or "/" in name or os.sep in name or "\0" in str(folder):
        yield f"{setting} must end in a plain name for a folder, not beginning with a dot"
        return
    try:
        resolved, expected = folder.resolve(), folder.parent.resolve() / name
    except (OSError, RuntimeError, ValueError) as error:  # circular links, names that the file system refuses
        yield f"{setting}: {error}"
        return
    if resolved != expected:
        yield f"{setting} leads to {resolved}, not to a folder in {folder.parent.resolve()}; name a real folder"

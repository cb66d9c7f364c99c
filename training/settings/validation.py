"""Checks the settings of a run before anything is loaded: all problems at once."""

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from data_prep.common.command_line import UserError, raise_all, unknown_name
from data_prep.common.hub import is_on_hub, repository_problem
from eval.common.launch import launch_problems, on_cpu, processes_launched, uses_fsdp
from training.settings.config import TrainingConfig
from training.settings.parsing import read_settings
from training.settings.schema import QUICKSTART_DATA


def read_config() -> TrainingConfig:
    """Reads the settings of this process's command line, as `load_config`; the first rank prints errors for all."""
    try:
        return load_config(sys.argv[1:], processes_launched())
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)
        raise


def load_config(argv: list[str], num_processes: int) -> TrainingConfig:
    """The configuration of `[CONFIG.yaml] [--name value ...]`, checked before anything is loaded.

    Raises:
        UserError: with every problem, each with its value, its bound and the remedy.
    """
    config, problems = read_settings(argv, num_processes)
    if not problems:  # with a wrong value replaced by its default, messages about sizes and lengths would be wrong too
        problems += _size_problems(config)
        problems += list(_batch_problems(config, num_processes)) or schedule_problems(config)
    problems += launch_problems()
    problems += _communication_problems(config, num_processes)
    problems += _data_problems(config)
    problems += _evaluation_problems(config, num_processes)
    known = config.to_dict()
    problems += [f"override: {unknown_name(name, known)}" for name in config.run.override if name not in known]
    problems += _hub_problems(config)
    problems += _folder_problems(config)
    raise_all(problems)
    return config


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


def _communication_problems(config: TrainingConfig, num_processes: int) -> Iterator[str]:
    kind = config.devices.gradient_compression
    if kind == "none":
        return
    if num_processes == 1:
        yield f"gradient_compression={kind!r} does nothing in a single process; use none"
    elif uses_fsdp():
        yield f"gradient_compression={kind!r} is for data-parallel processes, not FSDP; use none"
    elif kind == "bf16" and on_cpu():
        yield "gradient_compression='bf16' needs NCCL; use fp16"


def _data_problems(config: TrainingConfig) -> Iterator[str]:
    folders, weights, attention = config.data.data, config.data.data_weights, config.model.attn_implementation
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
    settings, tracker = config.evaluation, config.logging.report_to
    if settings.hellaswag_data is not None and not Path(settings.hellaswag_data).is_file():
        yield f"hellaswag_data={settings.hellaswag_data!r}: no such file; leave it out to download it"
    if settings.lm_eval_every and find_spec("lm_eval") is None:
        yield 'lm_eval_every needs the harness; pip install "lm-eval[hf]"'
    if settings.lm_eval_every and (limit := settings.lm_eval_limit) is not None and limit < num_processes:
        yield f"lm_eval_limit={limit} leaves some of {num_processes} processes without an item"
    if tracker not in ("none", "all") and find_spec(tracker) is None:
        yield f"report_to={tracker!r} is not installed; pip install {tracker}"


def _hub_problems(config: TrainingConfig) -> Iterator[str]:
    name = config.hub.hub_model_id
    if config.hub.push_to_hub and name is None:
        yield "push_to_hub needs the name of a repository; add --hub_model_id USER/NAME"
    elif config.hub.push_to_hub and os.environ.get("RANK", "0") == "0":  # this rank uploads
        yield from filter(None, [repository_problem("hub_model_id", str(name))])


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

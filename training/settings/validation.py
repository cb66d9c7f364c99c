"""Checks the settings of a run before anything is loaded: all problems at once."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from data_prep.common.command_line import UserError, raise_all, unknown_name
from data_prep.common.hub import is_on_hub, repository_problem
from eval.common.launch import launch_problems, on_cpu, processes_launched, uses_fsdp
from eval.hellaswag import RULES
from training.settings.config import TrainingConfig
from training.settings.parsing import read_settings
from training.settings.schema import QUICKSTART_DATA, EvaluationSettings


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
    # With a wrong value replaced by its default, messages about sizes and lengths would be wrong too.
    problems += [] if problems else _size_problems(config, num_processes)
    problems += launch_problems()
    problems += _communication_problems(config, num_processes)
    problems += _data_problems(config)
    problems += _evaluation_problems(config.evaluation, num_processes)
    tracker = config.logging.report_to
    if tracker not in ("none", "all") and find_spec(tracker) is None:
        problems.append(f"report_to={tracker!r} is not installed; pip install {tracker}")
    known = config.to_dict()
    problems += [f"override: {unknown_name(name, known)}" for name in config.run.override if name not in known]
    raise_all(problems + _hub_problems(config) + _folder_problems(config))
    return config


def _size_problems(config: TrainingConfig, num_processes: int) -> list[str]:
    model, problems = config.model, []
    if model.n_embd % model.n_head:
        problems.append(f"n_embd={model.n_embd} is not a multiple of n_head={model.n_head}; choose a divisor")
    if config.sequence_length > model.n_positions:
        problems.append(
            f"sequence_length={config.sequence_length} is longer than n_positions={model.n_positions}; lower the one "
            f"or raise the other"
        )
    if (tokens := config.evaluation.val_tokens) < config.sequence_length:
        problems.append(f"val_tokens={tokens} is less than one sequence of {config.sequence_length}; raise it")
    return problems + (_batch_problems(config, num_processes) or schedule_problems(config))


def _hub_problems(config: TrainingConfig) -> list[str]:
    name = config.hub.hub_model_id
    if not config.hub.push_to_hub:
        return []
    if name is None:
        return ["push_to_hub needs the name of a repository; add --hub_model_id USER/NAME"]
    uploads = os.environ.get("RANK", "0") == "0"
    return [problem] if uploads and (problem := repository_problem("hub_model_id", name)) else []


def _folder_problems(config: TrainingConfig) -> list[str]:
    folder = config.run_folder
    setting = f"run_name={config.run_name!r}" if config.run.output_dir is None else f"output_dir={str(folder)!r}"
    name = config.run_name if config.run.output_dir is None else folder.name
    if not name.strip() or name.startswith(".") or "/" in name or os.sep in name or "\0" in str(folder):
        return [f"{setting} must end in a plain name for a folder, not beginning with a dot"]
    try:
        resolved, expected = folder.resolve(), folder.parent.resolve() / name
    except (OSError, RuntimeError, ValueError) as error:  # circular links, names that the file system refuses
        return [f"{setting}: {error}"]
    if resolved != expected:
        return [f"{setting} leads to {resolved}, not to a folder in {folder.parent.resolve()}; name a real folder"]
    return []


def _data_problems(config: TrainingConfig) -> list[str]:
    folders, weights = config.data.data, config.data.data_weights
    problems = [
        f"data={folder!r}: no such folder; prepare one with python -m data_prep.prepare"
        for folder in folders
        if folder != QUICKSTART_DATA and not is_on_hub(folder) and not Path(folder).is_dir()
    ]
    if len(set(folders)) != len(folders):
        problems.append(f"data={folders} names a folder twice; give it a larger weight instead")
    if weights is not None and len(weights) != len(folders):
        problems.append(f"data_weights={weights}: {len(weights)} for {len(folders)} data folders; give one for each")
    if config.data.document_mask and config.model.attn_implementation.startswith("flash"):
        problems.append(
            f"document_mask does not work with attn_implementation={config.model.attn_implementation!r}; use sdpa or "
            f"flex_attention"
        )
    return problems


def _evaluation_problems(settings: EvaluationSettings, num_processes: int) -> list[str]:
    problems = [
        f"hellaswag_rules: {unknown_name(rule, RULES)}; known: {', '.join(RULES)}"
        for rule in settings.hellaswag_rules
        if rule not in RULES
    ]
    if settings.hellaswag_data is not None and not Path(settings.hellaswag_data).is_file():
        problems.append(f"hellaswag_data={settings.hellaswag_data!r}: no such file; leave it out to download it")
    if settings.samples_per_prompt > 1 and settings.sample_temperature == 0:
        problems.append(
            f"samples_per_prompt={settings.samples_per_prompt} with sample_temperature=0 are all the same; raise it"
        )
    if settings.lm_eval_every and find_spec("lm_eval") is None:
        problems.append('lm_eval_every needs the harness; pip install "lm-eval[hf]"')
    if settings.lm_eval_every and settings.lm_eval_limit is not None and settings.lm_eval_limit < num_processes:
        problems.append(
            f"lm_eval_limit={settings.lm_eval_limit} leaves some of {num_processes} processes without an item"
        )
    return problems


def _batch_problems(config: TrainingConfig, num_processes: int) -> list[str]:
    settings, length = config.optimizer, config.sequence_length
    micro = config.least_micro_batch
    unit = micro * length * num_processes
    start = settings.batch_ramp_start
    problems = [
        f"{name}={batch} is not a multiple of per_device_train_batch_size x sequence_length x processes = {micro} x "
        f"{length} x {num_processes} = {unit}; the nearest sizes that are: {_nearest(batch, unit)}"
        for name, batch in {
            "batch_tokens": settings.batch_tokens,
            "batch_ramp_start": start,
        }.items()
        if batch is not None and batch % unit
    ]
    if (start is not None) != (settings.batch_ramp_tokens > 0):
        problems.append(
            f"batch_ramp_tokens={settings.batch_ramp_tokens} and batch_ramp_start={start} make a ramp together; give "
            f"both or neither"
        )
    if start is not None and settings.batch_tokens % start:
        problems.append(
            f"batch_tokens={settings.batch_tokens} is not a multiple of batch_ramp_start={start}; choose a start that "
            f"divides it"
        )
    return problems


def _nearest(size: int, unit: int) -> str:
    below, above = size // unit * unit, -(-size // unit) * unit
    return f"{below} or {above}" if below else f"{above}"


def schedule_problems(config: TrainingConfig) -> list[str]:
    """Problems with the lengths of the schedule and of the batch ramp."""
    settings, schedule = config.optimizer, config.schedule
    problems = []
    if settings.batch_ramp_tokens > (tokens := config.batch_plan.tokens(config.max_steps)):
        problems.append(
            f"batch_ramp_tokens={settings.batch_ramp_tokens} exceeds the {tokens} tokens of the run; shorten the "
            f"ramp or lengthen the run"
        )
    unit, end = schedule.unit, f"max_{schedule.unit}={schedule.total}"
    if schedule.warmup > schedule.total:
        problems.append(f"warmup_{unit}={schedule.warmup} exceeds {end}; warm up for fewer")
    decays = settings.decay_steps is not None or settings.decay_tokens is not None
    if decays and schedule.name not in ("cosine", "linear"):
        problems.append(
            f"decay_{unit} does nothing under lr_scheduler_type={schedule.name!r}; use cosine or linear, or leave it"
        )
    elif decays and not schedule.warmup <= schedule.decay <= schedule.total:
        problems.append(
            f"decay_{unit}={schedule.decay} must lie between the warmup's {schedule.warmup} and {end}, as it counts "
            f"from the beginning of the run"
        )
    if schedule.cooldown and schedule.name != "wsd":
        problems.append(
            f"cooldown_{unit}={schedule.cooldown} does nothing under lr_scheduler_type={schedule.name!r}; use "
            f"--lr_scheduler_type wsd"
        )
    elif schedule.warmup <= schedule.total < schedule.warmup + schedule.cooldown:
        problems.append(
            f"cooldown_{unit}={schedule.cooldown} and warmup_{unit}={schedule.warmup} exceed {end}; to cool down "
            f"from a checkpoint, name it with --resume_from_checkpoint"
        )
    if settings.muon_learning_rate is not None and settings.optim != "muon":
        problems.append(f"muon_learning_rate does nothing under optim={settings.optim!r}; use --optim muon")
    return problems


def _communication_problems(config: TrainingConfig, num_processes: int) -> list[str]:
    kind = config.devices.gradient_compression
    if kind == "none":
        return []
    if num_processes == 1:
        return [f"gradient_compression={kind!r} does nothing in a single process; use none"]
    if uses_fsdp():
        return [f"gradient_compression={kind!r} is for data-parallel processes, not FSDP; use none"]
    if kind == "bf16" and on_cpu():
        return ["gradient_compression='bf16' needs NCCL; use fp16"]
    return []

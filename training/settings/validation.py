"""All that can be known to be wrong with the settings of a run before anything is loaded."""

import math
import os
from importlib.util import find_spec
from pathlib import Path

from data_prep.common.command_line import raise_all, unknown_name
from data_prep.common.hub import is_on_hub, repository_problem
from eval.common.devices import chosen_precision, fp8_is_available, on_cpu
from eval.hellaswag import RULES
from training.settings.schema import QUICKSTART_DATA, RunSettings, TrainingConfig

_MOST_WEIGHT = 1e12


def check_config(config: TrainingConfig, num_processes: int) -> None:
    """Check all that can be checked before anything is loaded.

    Raises:
        UserError: with every problem, each with its value, its bound and the remedy.
    """
    model, run = config.model, config.run
    problems = _out_of_range(config)
    if not problems:
        if model.n_embd % model.n_head:
            problems.append(f"n_embd={model.n_embd} is not a multiple of n_head={model.n_head}; choose a divisor")
        if config.sequence_length > model.n_positions:
            problems.append(
                f"sequence_length={config.sequence_length} is longer than n_positions={model.n_positions}; "
                f"lower the one or raise the other"
            )
        if run.val_tokens < config.sequence_length:
            problems.append(
                f"val_tokens={run.val_tokens} is less than one sequence of {config.sequence_length}; raise it"
            )
        # The lengths of the schedule follow from the batches; where those are wrong, so would be what is said of it.
        problems += _batch_problems(config, num_processes) or schedule_problems(config)
    problems += _precision_problems(config, num_processes)
    problems += _data_problems(config)
    problems += _evaluation_problems(run, num_processes)
    if run.report_to not in ("none", "all") and find_spec(run.report_to) is None:
        problems.append(f"report_to={run.report_to!r} is not installed; pip install {run.report_to}")
    if config.hub.push_to_hub is not None and os.environ.get("RANK", "0") == "0":  # the process that uploads
        problems += filter(None, [repository_problem("push_to_hub", config.hub.push_to_hub)])
    known = config.to_dict()
    problems += [f"override: {unknown_name(name, known)}" for name in run.override if name not in known]
    problems += _folder_problems(config)
    raise_all(problems)


def _folder_problems(config: TrainingConfig) -> list[str]:
    name, place = config.run.run_name, Path(config.run.runs_dir)
    if not name.strip() or name.startswith(".") or "/" in name or os.sep in name or "\0" in name:
        return [f"run_name={name!r} must be a plain name for a folder below runs_dir, not beginning with a dot"]
    try:
        resolved, expected = (place / name).resolve(), place.resolve() / name
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names that no disk takes
        return [f"run_name={name!r}: {error}"]
    if resolved != expected:
        return [f"run_name={name!r} leads to {resolved}, not to a folder below {place.resolve()}; name a real folder"]
    return []


def _out_of_range(config: TrainingConfig) -> list[str]:
    at_least = {
        1: "n_layer n_embd n_head n_positions sequence_length max_steps max_tokens batch_tokens batch_ramp_start "
        "micro_batch log_every val_every val_tokens sample_tokens save_every keep_last hellaswag_limit lm_eval_limit "
        "spike_window ddp_timeout",
        0: "warmup_steps warmup_tokens decay_steps decay_tokens cooldown_steps cooldown_tokens batch_ramp_tokens "
        "weight_decay z_loss sample_every seed adam_epsilon hellaswag_every lm_eval_every keep_every spike_zscore "
        "max_skipped price_per_hour",
    }
    settings = config.to_dict()
    problems = [
        f"{name}={settings[name]} must be at least {bound}"
        for bound, names in at_least.items()
        for name in names.split()
        if settings[name] not in (None, "auto") and not bound <= settings[name] < math.inf
    ]
    for name in ("learning_rate", "muon_learning_rate", "max_grad_norm", "max_minutes"):
        if settings[name] is not None and not 0 < settings[name] < math.inf:
            problems.append(f"{name}={settings[name]} must be a number greater than 0")
    for name in ("dropout", "adam_beta1", "adam_beta2", "muon_momentum"):
        if not 0 <= settings[name] < 1:
            problems.append(f"{name}={settings[name]} must be at least 0 and less than 1")
    if not 0 <= settings["min_lr_ratio"] <= 1:
        problems.append(f"min_lr_ratio={settings['min_lr_ratio']} must lie between 0 and 1")
    return problems


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
    if weights is not None and not all(0 < weight < _MOST_WEIGHT for weight in weights):
        problems.append(
            f"data_weights={weights} must be numbers greater than 0 and less than {_MOST_WEIGHT:g}; leave out folders "
            f"that are not wanted"
        )
    if config.data.document_mask and config.model.attn_implementation.startswith("flash"):
        problems.append(
            f"document_mask does not work with attn_implementation={config.model.attn_implementation!r}; use sdpa or "
            f"flex_attention"
        )
    return problems


def _evaluation_problems(run: RunSettings, num_processes: int) -> list[str]:
    problems = [
        f"hellaswag_rules: {unknown_name(rule, RULES)}; known: {', '.join(RULES)}"
        for rule in run.hellaswag_rules
        if rule not in RULES
    ]
    if run.hellaswag_data is not None and not Path(run.hellaswag_data).is_file():
        problems.append(f"hellaswag_data={run.hellaswag_data!r}: no such file; leave it out to download it")
    if run.lm_eval_every and find_spec("lm_eval") is None:
        problems.append('lm_eval_every needs the harness; pip install "lm-eval[hf]"')
    if run.lm_eval_every and run.lm_eval_limit is not None and run.lm_eval_limit < num_processes:
        problems.append(f"lm_eval_limit={run.lm_eval_limit} leaves some of {num_processes} processes without an item")
    return problems


def _batch_problems(config: TrainingConfig, num_processes: int) -> list[str]:
    settings, length = config.optimizer, config.sequence_length
    micro = 1 if settings.micro_batch == "auto" else settings.micro_batch
    unit = micro * length * num_processes
    ramp = settings.batch_ramp_start is not None
    problems = [
        f"{name}={batch} is not a multiple of micro_batch x sequence_length x processes = {micro} x {length} x "
        f"{num_processes} = {unit}; the nearest sizes that are: {_nearest(batch, unit)}"
        for name, batch in {
            "batch_tokens": settings.batch_tokens,
            "batch_ramp_start": settings.batch_ramp_start,
        }.items()
        if batch is not None and batch % unit
    ]
    if ramp != (settings.batch_ramp_tokens > 0):
        problems.append(
            f"batch_ramp_tokens={settings.batch_ramp_tokens} and batch_ramp_start={settings.batch_ramp_start} make a "
            f"ramp together; give both or neither"
        )
    if ramp and settings.batch_tokens % settings.batch_ramp_start:
        problems.append(
            f"batch_tokens={settings.batch_tokens} is not a multiple of batch_ramp_start={settings.batch_ramp_start}; "
            f"choose a start that divides it"
        )
    return problems


def _nearest(size: int, unit: int) -> str:
    below, above = size // unit * unit, -(-size // unit) * unit
    return f"{below} or {above}" if below else f"{above}"


def schedule_problems(config: TrainingConfig) -> list[str]:
    """What is wrong with the lengths of a run's schedule and batches."""
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
            f"decay_{unit} does nothing under schedule={schedule.name!r}; use cosine or linear, or leave it"
        )
    elif decays and not schedule.warmup <= schedule.decay <= schedule.total:
        problems.append(
            f"decay_{unit}={schedule.decay} must lie between the warmup's {schedule.warmup} and {end}, as it counts "
            f"from the beginning of the run"
        )
    if schedule.cooldown and schedule.name != "wsd":
        problems.append(
            f"cooldown_{unit}={schedule.cooldown} does nothing under schedule={schedule.name!r}; use --schedule wsd"
        )
    elif schedule.warmup <= schedule.total < schedule.warmup + schedule.cooldown:
        problems.append(
            f"cooldown_{unit}={schedule.cooldown} and warmup_{unit}={schedule.warmup} exceed {end}; to cool down "
            f"from a checkpoint, name it with --resume"
        )
    if settings.muon_learning_rate is not None and settings.optimizer != "muon":
        problems.append(f"muon_learning_rate does nothing under optimizer={settings.optimizer!r}; use --optimizer muon")
    return problems


def _precision_problems(config: TrainingConfig, num_processes: int) -> list[str]:
    problems = []
    if chosen_precision(config.run.mixed_precision) == "fp8":
        if find_spec("torchao") is None:
            problems.append("mixed_precision='fp8' needs torchao; pip install torchao")
        if not fp8_is_available():
            problems.append(
                "mixed_precision='fp8' needs a GPU with fp8 matrix products (compute capability 8.9 or more, as L4 or "
                "H100); use bf16"
            )
    if config.run.gradient_compression != "none":
        if num_processes == 1:
            problems.append("gradient_compression does nothing in a single process; leave it out")
        elif on_cpu():
            problems.append("gradient_compression needs NCCL, and so GPUs; leave it out")
        elif os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
            problems.append("gradient_compression is for data-parallel processes, not FSDP; leave it out")
    return problems

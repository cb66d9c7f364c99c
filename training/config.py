"""The settings of a run: declared once, read from flags over file over preset over defaults, checked all at once."""

import dataclasses
import math
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser

from data_prep.cli import UserError, unknown_name
from eval.hellaswag import RULES
from modeling import PRESETS

QUICKSTART_DATA = "data/quickstart"


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class ModelSettings:
    _argument_group_name = "model"

    preset: str | None = _field(None, "published size that the settings below start from: " + ", ".join(PRESETS))
    n_layer: int = _field(3, "transformer blocks")
    n_embd: int = _field(192, "width of the residual stream, in channels")
    n_head: int = _field(3, "attention heads")
    n_positions: int = _field(256, "longest context of the model, in tokens")
    dropout: float = _field(0.0, "dropout of embeddings, attention and residual branches; 0 for pre-training")
    attn_implementation: str = _field("sdpa", "attention kernel: sdpa, flash_attention_2, flex_attention, eager, ...")
    gradient_checkpointing: bool = _field(False, "keep only each block's input for the backward pass")


@dataclass
class DataSettings:
    _argument_group_name = "data"

    data: list[str] = dataclasses.field(
        default_factory=lambda: [QUICKSTART_DATA],
        metadata={"help": "data folders made by data_prep.prepare; the default is prepared if missing"},
    )
    data_weights: list[float] | None = dataclasses.field(
        default=None,
        metadata={"help": "share of each data folder in the training tokens, in any unit; by size if not given"},
    )
    sequence_length: int | None = _field(None, "tokens in a training sequence; n_positions if not given")
    order: Literal["shuffled", "sequential"] = _field(
        "shuffled", "shards and documents permuted anew each epoch, or as they lie on disk"
    )
    document_mask: bool = _field(False, "keep attention and positions within documents")


@dataclass
class OptimizerSettings:
    _argument_group_name = "optimization"

    max_steps: int = _field(800, "optimizer steps in the whole run")
    batch_tokens: int = _field(2048, "tokens in a step, over all processes and micro-batches")
    micro_batch: int = _field(8, "sequences in one forward pass of one process")
    learning_rate: float = _field(3e-3, "peak learning rate")
    min_lr_ratio: float = _field(0.1, "learning rate at the end of the cosine, as a fraction of the peak")
    warmup_steps: int = _field(40, "steps of linear warmup")
    weight_decay: float = _field(0.1, "AdamW's weight decay, on matrices and embeddings only")
    adam_beta1: float = _field(0.9, "AdamW's beta1")
    adam_beta2: float = _field(0.95, "AdamW's beta2")
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _field(1.0, "gradients are scaled down to this norm")


@dataclass
class RunSettings:
    _argument_group_name = "run"

    run_name: str = _field("quickstart", "the run's folder is RUNS_DIR/RUN_NAME")
    runs_dir: str = _field("runs", "where runs are kept")
    resume: bool = _field(False, "go on from the newest complete checkpoint of this run")
    seed: int = _field(1337, "of the initial weights, the order of data, dropout and samples")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _field(
        "auto", "auto: the launch file's if it names one, else bf16 where the hardware is good at it"
    )
    compile: Literal["auto", "on", "off"] = _field("auto", "torch.compile each block; auto: on CUDA")
    log_every: int = _field(20, "steps between two lines of progress where there is no terminal")
    val_every: int = _field(200, "steps between two validations")
    val_tokens: int = _field(65536, "tokens in a validation, the same ones each time")
    sample_every: int = _field(400, "steps between two rounds of samples; 0 for none")
    sample_prompts: list[str] = dataclasses.field(
        default_factory=lambda: ["def", "import", "class"], metadata={"help": "texts to continue"}
    )
    sample_tokens: int = _field(64, "tokens to continue each of them by")
    hellaswag_every: int = _field(0, "steps between two evaluations on HellaSwag; 0 for none")
    hellaswag_data: str | None = _field(None, "hellaswag_val.jsonl; downloaded if not given")
    hellaswag_limit: int | None = _field(None, "only the first so many of its items")
    hellaswag_rules: list[str] = dataclasses.field(
        default_factory=lambda: ["completion"], metadata={"help": "to score by: completion, lm_eval or both"}
    )
    lm_eval_every: int = _field(0, "steps between two runs of the lm-evaluation-harness; 0 for none")
    lm_eval_tasks: list[str] = dataclasses.field(
        default_factory=lambda: ["lambada_openai", "wikitext"], metadata={"help": "its tasks and groups"}
    )
    lm_eval_limit: int | None = _field(None, "only the first so many items of each task")
    save_every: int = _field(400, "steps between two checkpoints; the last step always has one")
    keep_last: int = _field(2, "checkpoints to keep beside the one with the best validation loss")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = _field(
        "none", "tracker to report to as well; all: those that are installed"
    )


@dataclass
class TrainingConfig:
    """Every setting of a run, by group."""

    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    run: RunSettings

    @property
    def sequence_length(self) -> int:
        """Tokens in a training sequence."""
        return self.data.sequence_length or self.model.n_positions

    @property
    def run_folder(self) -> Path:
        return Path(self.run.runs_dir) / self.run.run_name

    def accumulation_steps(self, num_processes: int) -> int:
        """Micro-batches that each of `num_processes` processes contributes to a step."""
        return self.optimizer.batch_tokens // (self.optimizer.micro_batch * self.sequence_length * num_processes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as one flat dictionary: what `config.yaml` holds and any run can be started from."""
        flat: dict[str, Any] = {}
        for group in (self.model, self.data, self.optimizer, self.run):
            flat |= dataclasses.asdict(group)
        return flat


class _Parser(HfArgumentParser):
    def __init__(self) -> None:
        groups = (ModelSettings, DataSettings, OptimizerSettings, RunSettings)
        super().__init__(
            groups,
            prog="accelerate launch training/train.py",
            usage="%(prog)s [CONFIG.yaml] [--name value ...]",
            description="Train a GPT. Flags go over the file, the file over the preset, the preset over the defaults.",
            allow_abbrev=False,
        )

    def error(self, message: str) -> None:
        raise UserError(message)


def parse_config(argv: list[str]) -> TrainingConfig:
    """Read `[CONFIG.yaml] [--name value ...]`.

    A file and a preset are turned into flags that stand before those of the command line: one reader for all, and the
    last word wins.

    Raises:
        UserError: with every unknown name and every value of the wrong type.
    """
    parser = _Parser()
    flags = list(argv)
    settings = _read_yaml(flags.pop(0)) if flags and not flags[0].startswith("-") else {}
    options = [_to_flag(name, value) for name, value in settings.items() if value is not None] + _options(flags)
    problems: list[str] = []
    good: list[list[str]] = []
    for option in options:
        try:
            *_, unknown = parser.parse_args_into_dataclasses(option, True, look_for_args_file=False)
        except UserError as error:
            problems.append(f"{option[0]}: {str(error).partition(': ')[2]}")  # argparse names both its spellings
            continue
        if option[0] in unknown:
            unknown = option[:1]
        problems += [unknown_name(word, parser._option_string_actions) for word in unknown]
        good.append(option)
    presets = [option[1] for option in good if option[0] == "--preset" and len(option) == 2]
    if presets and presets[-1] not in PRESETS:
        problems.append(f"--preset: {unknown_name(presets[-1], PRESETS)}; known: {', '.join(PRESETS)}")
    _raise(problems)
    if presets:
        preset = dataclasses.asdict(PRESETS[presets[-1]])
        good = [_to_flag(name, value) for name, value in preset.items()] + good
    words = [word for option in good for word in option]
    return TrainingConfig(*parser.parse_args_into_dataclasses(words, look_for_args_file=False))


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected lines of `name: value`, found {type(settings).__name__}")
    return settings


def _to_flag(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]


def _options(flags: list[str]) -> list[list[str]]:
    """The words of a command line, grouped into options with their values."""
    options: list[list[str]] = []
    for word in flags:
        if word.startswith("--") or word == "-h" or not options:
            options.append(word.split("=", 1))
        else:
            options[-1].append(word)
    return options


def check_config(config: TrainingConfig, num_processes: int) -> None:
    """Check all that can be checked before anything is loaded.

    Raises:
        UserError: with every problem, each with its value, its bound and the remedy.
    """
    model, optimizer, run = config.model, config.optimizer, config.run
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
        problems += _batch_problems(config, num_processes)
        if optimizer.warmup_steps > optimizer.max_steps:
            problems.append(
                f"warmup_steps={optimizer.warmup_steps} exceeds max_steps={optimizer.max_steps}; warm up for fewer"
            )
    problems += _data_problems(config)
    problems += _evaluation_problems(run, num_processes)
    if run.report_to not in ("none", "all") and find_spec(run.report_to) is None:
        problems.append(f"report_to={run.report_to!r} is not installed; pip install {run.report_to}")
    if Path(run.run_name).name != run.run_name:
        problems.append(f"run_name={run.run_name!r} is not the name of a folder; use runs_dir for the place")
    _raise(problems)


def _out_of_range(config: TrainingConfig) -> list[str]:
    at_least = {
        1: "n_layer n_embd n_head n_positions sequence_length max_steps batch_tokens micro_batch log_every val_every "
        "val_tokens sample_tokens save_every keep_last hellaswag_limit lm_eval_limit",
        0: "warmup_steps weight_decay sample_every seed adam_epsilon hellaswag_every lm_eval_every",
    }
    settings = config.to_dict()
    problems = [
        f"{name}={settings[name]} must be at least {bound}"
        for bound, names in at_least.items()
        for name in names.split()
        if settings[name] is not None and settings[name] < bound
    ]
    for name in ("learning_rate", "max_grad_norm"):
        if not 0 < settings[name] < math.inf:
            problems.append(f"{name}={settings[name]} must be a number greater than 0")
    for name in ("dropout", "adam_beta1", "adam_beta2"):
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
        if folder != QUICKSTART_DATA and not Path(folder).is_dir()
    ]
    if len(set(folders)) != len(folders):
        problems.append(f"data={folders} names a folder twice; give it a larger weight instead")
    if weights is not None and len(weights) != len(folders):
        problems.append(f"data_weights={weights}: {len(weights)} for {len(folders)} data folders; give one for each")
    if weights is not None and not all(0 < weight < math.inf for weight in weights):
        problems.append(f"data_weights={weights} must be numbers greater than 0; leave out folders that are not wanted")
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
    batch, micro, length = config.optimizer.batch_tokens, config.optimizer.micro_batch, config.sequence_length
    unit = micro * length * num_processes
    if batch % unit == 0:
        return []
    below, above = batch // unit * unit, -(-batch // unit) * unit
    nearest = f"{below} or {above}" if below else f"{above}"
    return [
        f"batch_tokens={batch} is not a multiple of micro_batch x sequence_length x processes = {micro} x {length} x "
        f"{num_processes} = {unit}; the nearest sizes that are: {nearest}"
    ]


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems with the settings:" + "".join(f"\n  - {p}" for p in problems))

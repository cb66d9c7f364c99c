"""The settings of a run: each with its name, type, bounds, default and meaning; and what follows from them.

Names are those of `transformers.TrainingArguments` where it has the setting (docs/training.md has the table).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from data_prep.common.schema import Count, Positive
from modeling.presets import PRESETS
from training.settings.schedule import BatchPlan, Schedule, ScheduleName

QUICKSTART_DATA = "data/quickstart"
MODEL_SIZES = ("n_layer", "n_embd", "n_head", "n_positions")  # decided by a checkpoint
NEWEST = "newest"  # --resume_from_checkpoint without a path
START = ("resume_from_checkpoint", "auto_resume", "override", "preflight")  # settings of a start, not of the run
# They begin a run, or change no more than the rounding of its results.
_HARMLESS = ("preset", "model_name_or_path", "attn_implementation", "per_device_train_batch_size")
_MICRO_BATCH = 8  # largest default

PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Weights = list[Annotated[float, Field(gt=0, lt=1e12)]]
Names = Annotated[list[str], Field(min_length=1)]
Recomputed = Annotated[
    Literal["none", "selective", "full"] | bool,
    AfterValidator(lambda value: {True: "full", False: "none"}.get(value, value)),  # as in TrainingArguments
]


def _help(default: Any, text: str) -> Any:
    factory: Any = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": text})


@dataclass(frozen=True)
class ModelSettings:
    """The model and where its weights come from."""

    preset: str | None = _help(None, "published size that the settings below start from: " + ", ".join(PRESETS))
    model_name_or_path: str | None = _help(None, "GPT-2, in a folder or on the Hub, that gives sizes and weights")
    n_layer: Positive = _help(2, "transformer blocks")
    n_embd: Positive = _help(192, "width of the residual stream, in channels")
    n_head: Positive = _help(3, "attention heads")
    n_positions: Positive = _help(256, "longest context of the model, in tokens")
    dropout: BelowOne = _help(0.0, "dropout of embeddings, attention and residual branches; 0 for pre-training")
    attn_implementation: str = _help("auto", "sdpa, flash_attention_2, flex_attention, eager, ...; auto: the faster")


@dataclass(frozen=True)
class DataSettings:
    """The training data and its order."""

    data: Names = _help([QUICKSTART_DATA], "folders, or hf://datasets/USER/NAME; the default is prepared if missing")
    data_weights: Weights | None = _help(None, "share of each folder in the tokens, in any unit; else by size")
    sequence_length: Positive | None = _help(None, "tokens in a training sequence; n_positions if not given")
    order: Literal["shuffled", "sequential"] = _help("shuffled", "permuted anew each epoch, or in the order on disk")
    document_mask: bool = _help(False, "keep attention and positions within documents")
    overfit_single_batch: bool = _help(False, "train on the first batch again and again: the loss must go to 0")


@dataclass(frozen=True)
class OptimizerSettings:
    """Length of the run, batch, optimizer and schedule."""

    max_steps: Positive = _help(1000, "optimizer steps in the whole run")
    max_tokens: Positive | None = _help(None, "tokens in the whole run, in place of max_steps; up to whole steps")
    batch_tokens: Positive = _help(2048, "tokens in a step, over all processes; the default is rounded to fit them")
    batch_ramp_tokens: Count = _help(0, "tokens over which the batch grows linearly to batch_tokens; 0 for no ramp")
    batch_ramp_start: Positive | None = _help(None, "tokens in the ramp's first step; each batch is a multiple of it")
    per_device_train_batch_size: Literal["auto"] | Positive | None = _help(
        None,
        "sequences in a forward pass of one process (micro-batch); auto: the most that fits; if not given, up to 8",
    )
    optim: Literal["adamw", "muon"] = _help(
        "muon", "muon: Muon for the blocks' matrices, AdamW for the rest; with a preset or a model, adamw if not given"
    )
    learning_rate: PositiveFloat = _help(2e-2, "peak learning rate, of AdamW; without Muon 3e-3 if not given")
    muon_learning_rate: PositiveFloat | None = _help(6e-3, "Muon's peak; learning_rate if only that is given")
    muon_momentum: BelowOne = _help(0.95, "Muon's momentum (Nesterov's)")
    weight_decay: NonNegative = _help(0.1, "decoupled weight decay, on matrices and embeddings only")
    adam_beta1: BelowOne = _help(0.9, "AdamW's beta1")
    adam_beta2: BelowOne = _help(0.95, "AdamW's beta2")
    adam_epsilon: NonNegative = _help(1e-8, "AdamW's epsilon")
    max_grad_norm: PositiveFloat = _help(1.0, "gradients are scaled down to this norm")
    z_loss: NonNegative = _help(0.0, "weight of the squared log of the softmax's normalizer in the loss; 0 for none")
    lr_scheduler_type: ScheduleName = _help("cosine", "after the warmup; wsd: stable, then linear cooldown at the end")
    warmup_steps: Count = _help(40, "steps of linear warmup")
    warmup_tokens: Count | None = _help(None, "tokens of linear warmup, in place of warmup_steps")
    decay_tokens: Count | None = _help(None, "tokens until cosine or linear end; else the whole run")
    cooldown_steps: Count = _help(
        0, "last steps of a wsd run, in which the learning rate falls; with a checkpoint of another run: steps to add"
    )
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = _help(
        0.1, "learning rate after the decay, relative to its peak"
    )


@dataclass(frozen=True)
class RunSettings:
    """Where a run is kept, how it starts and ends."""

    output_dir: str | None = _help(None, "folder of the run; runs/RUN_NAME if not given")
    run_name: str | None = _help(None, "name of the run for trackers; the last part of output_dir, or quickstart")
    resume_from_checkpoint: str | None = _help(
        None,
        "continue from the newest checkpoint of this run, or branch off from PATH, with the settings of its run",
    )
    auto_resume: bool = _help(False, "continue if there is a checkpoint: the same command starts and restarts a run")
    override: list[str] = _help([], "settings that a resumed run may change, though they change its result")
    preflight: bool = _help(False, "run every part once, report what the run will take, and leave nothing behind")
    max_minutes: PositiveFloat | None = _help(None, "end with a checkpoint after this time, as on SIGTERM")
    seed: Count = _help(1337, "seed of the initial weights, the order of data, dropout and samples")
    full_determinism: bool = _help(False, "only operations that give the same bits each time, also on a GPU; slower")


@dataclass(frozen=True)
class DeviceSettings:
    """Precision, compilation, memory and communication."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = _help(
        "auto",
        "auto: that of the Accelerate config if it names one, else bf16 or fp16 if the hardware is fast at it, else no",
    )
    torch_compile: Literal["auto"] | bool = _help("auto", "torch.compile each block; auto: on CUDA")
    gradient_checkpointing: Recomputed = _help(
        "none",
        "recompute activations in the backward pass. selective: all but the results of matrix products and attention; "
        "full, or true: all but the input of each block",
    )
    gradient_compression: Literal["none", "fp16", "bf16"] = _help(
        "none", "precision in which data-parallel processes exchange gradients; none: float32"
    )
    ddp_timeout: Positive = _help(3600, "seconds that a process waits for the others, which may be downloading")


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluations during a run, and how often they run."""

    eval_steps: Positive = _help(200, "steps between two validations")
    val_tokens: Positive = _help(65536, "tokens in a validation, the same ones each time")
    sample_every: Count = _help(500, "steps between two rounds of samples; 0 for none")
    sample_prompts: list[str] = _help(["def", "import", "class"], "texts to continue, each once")
    sample_tokens: Positive = _help(64, "tokens in a sample")
    hellaswag_every: Count = _help(0, "steps between two evaluations on HellaSwag; 0 for none")
    hellaswag_data: str | None = _help(None, "hellaswag_val.jsonl; downloaded if not given")
    hellaswag_limit: Positive | None = _help(None, "only the first N items")
    lm_eval_every: Count = _help(0, "steps between two runs of the lm-evaluation-harness; 0 for none")
    lm_eval_tasks: Names = _help(["lambada_openai", "wikitext"], "tasks and groups of the harness")
    lm_eval_limit: Positive | None = _help(None, "only the first N items of each task")


@dataclass(frozen=True)
class CheckpointSettings:
    """When checkpoints are saved, and which are kept."""

    save_steps: Positive = _help(500, "steps between two checkpoints; the last step and each new best are saved too")
    save_total_limit: Positive = _help(2, "newest checkpoints to keep, beside the one with the best validation loss")
    keep_every: Count = _help(0, "also keep the checkpoints of every N steps; 0 for none")


@dataclass(frozen=True)
class LoggingSettings:
    """Progress lines and trackers."""

    logging_steps: Positive = _help(20, "steps between two lines of progress where there is no terminal")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = _help(
        "none", "tracker to report to as well; all: those that are installed"
    )


@dataclass(frozen=True)
class HubSettings:
    """Uploads to the Hub."""

    push_to_hub: bool = _help(False, "upload checkpoints to the Hub, with a model card, during training")
    hub_model_id: str | None = _help(None, "USER/NAME of the repository to upload to")
    hub_strategy: Literal["end", "checkpoint", "best", "all"] = _help(
        "checkpoint",
        "checkpoints to upload. end: the last; checkpoint: the newest, whenever the upload before it is done; best: "
        "each that is the best so far; all: every one",
    )
    hub_revisions: bool = _help(False, "tag each of them with its step, as in step_00000500")
    hub_private_repo: bool = _help(False, "make the repository private, if it does not exist yet")
    hub_license: str = _help("mit", "licence in the model card, as the Hub spells it")


@dataclass(frozen=True)
class DivergenceSettings:
    """The response to a loss that is not finite, or a spike."""

    on_nonfinite: Literal["skip", "halt", "rollback"] = _help(
        "skip",
        "for a loss or gradient that is not finite, which never gets into the weights. skip: skip the batch; halt: end "
        "the run; rollback: go back to the last checkpoint and skip the batch from there",
    )
    spike_zscore: NonNegative = _help(0.0, "roll back for a loss or norm this many deviations above its mean; 0: never")
    spike_window: Positive = _help(128, "steps that the mean and the standard deviation are taken over")
    max_skipped: Count = _help(10, "batches to skip before the run halts")


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a run, by group."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False, "coerce_numbers_to_str": True}

    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    run: RunSettings
    devices: DeviceSettings
    evaluation: EvaluationSettings
    checkpointing: CheckpointSettings
    logging: LoggingSettings
    hub: HubSettings
    divergence: DivergenceSettings

    @property
    def sequence_length(self) -> int:
        """Tokens in a training sequence."""
        return self.data.sequence_length or self.model.n_positions

    @property
    def run_folder(self) -> Path:
        return Path("runs", self.run_name) if self.run.output_dir is None else Path(self.run.output_dir)

    @property
    def run_name(self) -> str:
        """Name of the run for trackers."""
        default = "quickstart" if self.run.output_dir is None else Path(self.run.output_dir).name
        return default if self.run.run_name is None else self.run.run_name

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    @property
    def report_folder(self) -> Path:
        return self.run_folder / "report"

    @cached_property
    def batch_plan(self) -> BatchPlan:
        """Tokens of each step."""
        settings = self.optimizer
        start = settings.batch_ramp_start or settings.batch_tokens
        return BatchPlan(settings.batch_tokens, start, settings.batch_ramp_tokens)

    @cached_property
    def max_steps(self) -> int:
        """Optimizer steps in the whole run."""
        settings = self.optimizer
        return settings.max_steps if settings.max_tokens is None else self.batch_plan.steps(settings.max_tokens)

    @cached_property
    def schedule(self) -> Schedule:
        """Learning rate over the run, in tokens if one of its lengths is given in tokens, else in steps."""
        settings = self.optimizer
        in_tokens = settings.warmup_tokens is not None or settings.decay_tokens is not None
        length = self.batch_plan.tokens if in_tokens else int
        total = length(self.max_steps)
        return Schedule(
            settings.lr_scheduler_type,
            "tokens" if in_tokens else "steps",
            warmup=length(settings.warmup_steps) if settings.warmup_tokens is None else settings.warmup_tokens,
            decay=total if settings.decay_tokens is None else settings.decay_tokens,
            cooldown=total - length(self.max_steps - settings.cooldown_steps),
            total=total,
            min_ratio=settings.min_lr_ratio,
        )

    @property
    def least_micro_batch(self) -> int:
        """The given micro-batch; 1 if it is left to the program."""
        given = self.optimizer.per_device_train_batch_size
        return given if isinstance(given, int) else 1

    def micro_batches(self, num_processes: int) -> list[int]:
        """Possible micro-batches, ascending: each batch is a whole number of them for each process."""
        plan = self.batch_plan
        sequences = math.gcd(plan.batch_tokens, plan.ramp_start) // (self.sequence_length * num_processes)
        return [size for size in range(1, sequences + 1) if sequences % size == 0]

    def micro_batch(self, num_processes: int) -> int:
        """Sequences in one forward pass of one process, unless they are searched for (`auto`)."""
        given = self.optimizer.per_device_train_batch_size
        if given is not None:
            return int(given)
        return max(size for size in self.micro_batches(num_processes) if size <= _MICRO_BATCH)

    def replace(self, **settings: Any) -> "TrainingConfig":
        """A copy with changed settings, by their names."""
        groups = {}
        for group in dataclasses.fields(self):
            old = getattr(self, group.name)
            names = settings.keys() & vars(old).keys()
            groups[group.name] = dataclasses.replace(old, **{name: settings.pop(name) for name in names})
        if settings:
            raise TypeError(f"no settings: {', '.join(settings)}")
        return TrainingConfig(**groups)

    def to_dict(self) -> dict[str, Any]:
        """All settings in one flat dictionary; `config.yaml` has them without those of `START`."""
        return {name: value for group in dataclasses.asdict(self).values() for name, value in group.items()}

    def different_sizes(self, saved: dict[str, Any]) -> list[str]:
        """Model sizes that differ from the `saved` ones, one line each."""
        asked = {name: getattr(self.model, name) for name in MODEL_SIZES}
        return [f"{name}={saved[name]}, not {size}" for name, size in asked.items() if saved[name] != size]

    def result_affecting_settings(self, mixed_precision: str) -> dict[str, Any]:
        """The settings that change the result of a run; those of its data are in `Data.identity`.

        Args:
            mixed_precision: the one in use, which `auto` stands for.
        """
        settings = dataclasses.asdict(self.model) | dataclasses.asdict(self.optimizer)
        settings |= {
            "mixed_precision": mixed_precision,
            "gradient_compression": self.devices.gradient_compression,
            "overfit_single_batch": self.data.overfit_single_batch,
        }
        return {name: value for name, value in settings.items() if name not in (*_HARMLESS, *MODEL_SIZES)}

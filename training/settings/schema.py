"""The settings of a run, declared once: names, types, defaults and what each of them means."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modeling import PRESETS
from training.settings.schedule import BatchPlan, Schedule, ScheduleName

QUICKSTART_DATA = "data/quickstart"
MODEL_SIZES = ("n_layer", "n_embd", "n_head", "n_positions")  # what a checkpoint decides
NEWEST = "newest"  # what --resume without a path stands for
START = ("resume", "auto_resume", "override", "preflight")  # settings of a start, not of the run
# What begins a run, or changes no more than the rounding of its results.
_HARMLESS = ("preset", "init_from", "attn_implementation", "activation_checkpointing", "micro_batch")


def _field(default: Any, help: str, **options: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclass
class ModelSettings:
    _argument_group_name = "model"

    preset: str | None = _field(None, "published size that the settings below start from: " + ", ".join(PRESETS))
    init_from: str | None = _field(
        None, "GPT-2 checkpoint, a folder or a name on the Hub, that gives the sizes below and the weights"
    )
    n_layer: int = _field(3, "transformer blocks")
    n_embd: int = _field(192, "width of the residual stream, in channels")
    n_head: int = _field(3, "attention heads")
    n_positions: int = _field(256, "longest context of the model, in tokens")
    dropout: float = _field(0.0, "dropout of embeddings, attention and residual branches; 0 for pre-training")
    attn_implementation: str = _field(
        "auto",
        "attention kernel: sdpa, flash_attention_2, flex_attention, eager, ...; auto: eager for short sequences on a "
        "CPU, else sdpa",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = _field(
        "none",
        "recompute in the backward pass what is not kept for it. selective: all but the results of matrix products and "
        "attention; full: all but the input of each block",
    )


@dataclass
class DataSettings:
    _argument_group_name = "data"

    data: list[str] = dataclasses.field(
        default_factory=lambda: [QUICKSTART_DATA],
        metadata={
            "help": "folders made by data_prep.prepare, or hf://datasets/USER/NAME; the default is prepared if missing"
        },
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
    max_tokens: int | None = _field(None, "tokens in the whole run, in place of max_steps; up to whole steps")
    batch_tokens: int = _field(2048, "tokens in a step, over all processes and micro-batches")
    batch_ramp_tokens: int = _field(0, "tokens over which the batch grows linearly to batch_tokens; 0 for no ramp")
    batch_ramp_start: int | None = _field(None, "tokens in the first step of the ramp; each batch is a multiple of it")
    micro_batch: int | str = _field(
        8, "sequences in one forward pass of one process; auto: the most that memory has room for, found at the start"
    )
    optimizer: Literal["adamw", "muon"] = _field(
        "adamw", "muon: Muon for the matrices of the blocks, AdamW for all else"
    )
    learning_rate: float = _field(3e-3, "peak learning rate")
    muon_learning_rate: float | None = _field(
        None, "of the matrices under Muon, whose updates are scaled to AdamW's size; learning_rate if not given"
    )
    muon_momentum: float = _field(0.95, "Muon's momentum (Nesterov's)")
    weight_decay: float = _field(0.1, "decoupled weight decay, on matrices and embeddings only")
    adam_beta1: float = _field(0.9, "AdamW's beta1")
    adam_beta2: float = _field(0.95, "AdamW's beta2")
    adam_epsilon: float = _field(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _field(1.0, "gradients are scaled down to this norm")
    z_loss: float = _field(0.0, "weight of the squared logarithm of the softmax's normalizer in the loss; 0 for none")
    schedule: ScheduleName = _field(  # noqa: RUF009
        "cosine", "of the learning rate after its warmup; wsd: stable, then a linear cooldown at the end"
    )
    warmup_steps: int = _field(40, "steps of linear warmup")
    warmup_tokens: int | None = _field(None, "tokens of linear warmup, in place of warmup_steps")
    decay_steps: int | None = _field(None, "steps until cosine or linear end, from the beginning; all if not given")
    decay_tokens: int | None = _field(None, "tokens until cosine or linear end, in place of decay_steps")
    cooldown_steps: int = _field(
        0, "last steps of a wsd run, in which the learning rate falls; with --resume CHECKPOINT: how many to add to it"
    )
    cooldown_tokens: int | None = _field(None, "last tokens of a wsd run, in place of cooldown_steps")
    min_lr_ratio: float = _field(0.1, "learning rate after the decay, as a fraction of the peak")


@dataclass
class RunSettings:
    _argument_group_name = "run"

    run_name: str = _field("quickstart", "the run's folder is RUNS_DIR/RUN_NAME")
    runs_dir: str = _field("runs", "where runs are kept")
    resume: str | None = _field(
        None,
        "go on from the newest complete checkpoint of this run; with a checkpoint of another run: branch off from "
        "there; the settings are those of that run unless others are given",
        nargs="?",
        const=NEWEST,
    )
    auto_resume: bool = _field(
        False, "go on from this run's newest checkpoint where there is one: the command that starts it restarts it too"
    )
    override: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": "settings that a resumed run may have changed, though they change its result"},
    )
    preflight: bool = _field(
        False, "go through all of it once, in about a minute, say what the run will take, and leave nothing behind"
    )
    price_per_hour: float | None = _field(None, "of all devices together, for what preflight says of the cost")
    max_minutes: float | None = _field(None, "end with a checkpoint after so long, as on SIGTERM")
    seed: int = _field(1337, "of the initial weights, the order of data, dropout and samples")
    mixed_precision: Literal["auto", "no", "bf16", "fp16", "fp8"] = _field(
        "auto", "auto: the launch file's if it names one, else bf16 where the hardware is good at it"
    )
    compile: Literal["auto", "on", "off"] = _field("auto", "torch.compile each block; auto: on CUDA")
    ddp_timeout: int = _field(3600, "seconds that a process waits for the others, which may still be downloading")
    gradient_compression: Literal["none", "bf16"] = _field(
        "none", "precision that data-parallel processes exchange their gradients in; none: float32"
    )
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
    keep_every: int = _field(0, "keep those of each so many steps as well; 0 for none")
    deterministic: bool = _field(False, "only operations that give the same bits each time, also on a GPU; slower")
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] = _field(
        "none", "tracker to report to as well; all: those that are installed"
    )


@dataclass
class HubSettings:
    _argument_group_name = "publishing"

    push_to_hub: str | None = _field(
        None,
        "USER/NAME on the Hub, where checkpoints are uploaded to, with a model card, while training goes on; none: "
        "nowhere",
    )
    hub_strategy: Literal["end", "checkpoint", "best", "all"] = _field(
        "checkpoint",
        "what to upload. end: the last checkpoint; checkpoint: the newest, whenever the one before it is up; best: "
        "each that is the best so far; all: every one",
    )
    hub_revisions: bool = _field(False, "tag each of them with its step, as in step_00000500")
    hub_private_repo: bool = _field(False, "make the repository a private one, if it is not there yet")
    hub_license: str = _field("mit", "licence that the model card names, as the Hub spells it")

    def __post_init__(self) -> None:
        if self.push_to_hub == "none":
            self.push_to_hub = None


@dataclass
class DivergenceSettings:
    _argument_group_name = "when a step goes wrong"

    on_nonfinite: Literal["skip", "halt", "rollback"] = _field(
        "skip",
        "what to do about a loss or gradient that is not finite, which never gets into the weights. skip: pass over "
        "the batch; halt: end the run; rollback: go back to the last checkpoint and pass over the batch from there",
    )
    spike_zscore: float = _field(
        0.0, "go back like that for a loss or gradient norm so many standard deviations above its mean; 0 for never"
    )
    spike_window: int = _field(128, "steps that the mean and the standard deviation are of")
    max_skipped: int = _field(10, "batches to pass over before the run halts")


@dataclass
class DebugSettings:
    _argument_group_name = "looking for what is wrong"

    overfit_single_batch: bool = _field(False, "train on the first batch again and again: the loss must go to 0")
    detect_anomaly: bool = _field(False, "stop where a backward pass makes a NaN, and name the operation; slow")
    profile: bool = _field(False, "record a few of the first steps with torch's profiler, in RUN/profile")


@dataclass
class TrainingConfig:
    """Every setting of a run, by group."""

    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings
    run: RunSettings
    hub: HubSettings
    divergence: DivergenceSettings
    debug: DebugSettings

    @property
    def sequence_length(self) -> int:
        """Tokens in a training sequence."""
        return self.data.sequence_length or self.model.n_positions

    @property
    def run_folder(self) -> Path:
        return Path(self.run.runs_dir) / self.run.run_name

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    @property
    def report_folder(self) -> Path:
        return self.run_folder / "report"

    @property
    def batch_plan(self) -> BatchPlan:
        """The tokens of each step."""
        settings = self.optimizer
        return BatchPlan(
            settings.batch_tokens, settings.batch_ramp_start or settings.batch_tokens, settings.batch_ramp_tokens
        )

    @property
    def max_steps(self) -> int:
        """Optimizer steps in the whole run."""
        settings = self.optimizer
        return settings.max_steps if settings.max_tokens is None else self.batch_plan.steps(settings.max_tokens)

    @property
    def schedule(self) -> Schedule:
        """The learning rate over the run, in tokens if one of its lengths is given in tokens, else in steps."""
        settings, plan = self.optimizer, self.batch_plan
        pairs = {
            "warmup": (settings.warmup_steps, settings.warmup_tokens),
            "decay": (settings.decay_steps, settings.decay_tokens),
            "cooldown": (settings.cooldown_steps, settings.cooldown_tokens),
        }
        in_tokens = any(tokens is not None for _, tokens in pairs.values())
        total = plan.tokens(self.max_steps) if in_tokens else self.max_steps
        lengths = {}
        for name, (steps, tokens) in pairs.items():
            if tokens is None and steps is None:
                lengths[name] = total
            elif tokens is not None:
                lengths[name] = tokens
            elif in_tokens and name == "cooldown":
                lengths[name] = total - plan.tokens(self.max_steps - steps)
            else:
                lengths[name] = plan.tokens(steps) if in_tokens else steps
        return Schedule(
            name=settings.schedule,
            unit="tokens" if in_tokens else "steps",
            total=total,
            min_ratio=settings.min_lr_ratio,
            **lengths,
        )

    def accumulation_steps(self, batch_tokens: int, num_processes: int) -> int:
        """Micro-batches that each of `num_processes` processes contributes to a step of `batch_tokens`."""
        return batch_tokens // (int(self.optimizer.micro_batch) * self.sequence_length * num_processes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as one flat dictionary: what `config.yaml` holds and any run can be started from."""
        flat: dict[str, Any] = {}
        for group in dataclasses.asdict(self).values():
            flat |= group
        return flat

    def deciding(self, mixed_precision: str) -> dict[str, Any]:
        """The settings that decide the result of a run beside its data, of which `Data.identity` has what counts.

        Args:
            mixed_precision: the one in use, whatever was asked for.
        """
        settings = dataclasses.asdict(self.model) | dataclasses.asdict(self.optimizer)
        settings |= {"mixed_precision": mixed_precision, "gradient_compression": self.run.gradient_compression}
        settings |= {"overfit_single_batch": self.debug.overfit_single_batch}
        return {name: value for name, value in settings.items() if name not in (*_HARMLESS, *MODEL_SIZES)}

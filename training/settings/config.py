"""`TrainingConfig`: all settings of a run, and what follows from them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.settings import schema
from training.settings.schedule import BatchPlan, Schedule

# They begin a run, or change no more than the rounding of its results.
_HARMLESS = ("preset", "model_name_or_path", "attn_implementation", "per_device_train_batch_size")
_MICRO_BATCH = 8  # the most, if none is given


@dataclass(frozen=True)
class TrainingConfig:
    """Every setting of a run, by group."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False, "coerce_numbers_to_str": True}

    model: schema.ModelSettings
    data: schema.DataSettings
    optimizer: schema.OptimizerSettings
    run: schema.RunSettings
    devices: schema.DeviceSettings
    evaluation: schema.EvaluationSettings
    checkpointing: schema.CheckpointSettings
    logging: schema.LoggingSettings
    hub: schema.HubSettings
    divergence: schema.DivergenceSettings

    @property
    def sequence_length(self) -> int:
        """Tokens in a training sequence."""
        return self.data.sequence_length or self.model.n_positions

    @property
    def run_folder(self) -> Path:
        return Path("runs", self.run_name) if self.run.output_dir is None else Path(self.run.output_dir)

    @property
    def run_name(self) -> str:
        """The name of the run for trackers."""
        default = "quickstart" if self.run.output_dir is None else Path(self.run.output_dir).name
        return default if self.run.run_name is None else self.run.run_name

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
        in_tokens = settings.warmup_tokens is not None or settings.decay_tokens is not None

        def length(steps: int) -> int:
            return plan.tokens(steps) if in_tokens else steps

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
        """The given micro-batch, or 1 if it is not given or to be found."""
        given = self.optimizer.per_device_train_batch_size
        return given if isinstance(given, int) else 1

    def micro_batches(self, num_processes: int) -> list[int]:
        """The possible micro-batches, in ascending order: each batch is a whole number of them for each process."""
        settings = self.optimizer
        batch = math.gcd(settings.batch_tokens, settings.batch_ramp_start or settings.batch_tokens)
        sequences = batch // (self.sequence_length * num_processes)
        return [size for size in range(1, sequences + 1) if sequences % size == 0]

    def micro_batch(self, num_processes: int) -> int:
        """Sequences in one forward pass of one process, where they are not to be found by trying (`auto`)."""
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
        """All settings as one flat dictionary; `config.yaml` has them without those of `START`."""
        return {name: value for group in dataclasses.asdict(self).values() for name, value in group.items()}

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
        return {name: value for name, value in settings.items() if name not in (*_HARMLESS, *schema.MODEL_SIZES)}

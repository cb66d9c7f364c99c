"""TRL's `SFTTrainer` with the settings of this project."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from data_prep.common.command_line import option
from data_prep.common.schema import STRICT, Count, Positive

_WARMUP, _SAVED = 0.1, 0.1  # of all steps
_NAMED_AS_THERE = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
                   "seed")  # fmt: skip
PositiveFloat = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class FinetuningSettings:
    """Settings of the training, named as in `transformers.TrainingArguments`."""

    __pydantic_config__ = STRICT

    max_train_samples: Positive | None = option(None, "conversations to learn from; all by default", type=int)
    max_eval_samples: Positive = option(100, "conversations that are held out to measure on", type=int)
    learning_rate: PositiveFloat = option(3e-4, "AdamW's largest, reached after a tenth of the steps", type=float)
    num_train_epochs: PositiveFloat = option(1.0, "passes over the conversations", type=float)
    max_steps: Positive | None = option(None, "optimizer steps, instead of passes", type=int)
    per_device_train_batch_size: Positive = option(4, "rows of the model's context at a time", type=int)
    gradient_accumulation_steps: Positive = option(1, "batches in a step", type=int)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "auto is the fastest of the hardware", choices=["auto", "no", "bf16", "fp16"]
    )
    seed: Count = option(0, "random seed of the order and of new weights", type=int)


def finetune(
    model: Any, tokenizer: Any, data: dict[str, Any], settings: FinetuningSettings, folder: Path
) -> dict[int, float]:
    """Trains `model` in place on the assistant's tokens of packed conversations.

    Args:
        data: data sets `train` and `test` with a column `messages`.
        folder: for `Trainer`'s checkpoints, one after each tenth of the steps; the newest of an earlier call is resumed
            from.

    Returns:
        The losses of the held-out conversations, in nats per token of the assistant, by the number of steps before.
    """
    from trl import SFTConfig, SFTTrainer

    from eval.common.devices import chosen_precision
    from eval.common.launch import on_cpu

    precision = chosen_precision(settings.mixed_precision)
    config = SFTConfig(
        **{name: getattr(settings, name) for name in _NAMED_AS_THERE},
        output_dir=str(folder),
        max_length=model.config.n_positions,
        packing=True,
        assistant_only_loss=True,
        lr_scheduler_type="cosine",
        warmup_steps=_WARMUP,
        max_steps=settings.max_steps or -1,
        per_device_eval_batch_size=settings.per_device_train_batch_size,
        activation_checkpointing=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=on_cpu(),
        ddp_find_unused_parameters=False,
        eval_on_start=True,
        eval_strategy="epoch",
        save_steps=_SAVED,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer: Any = SFTTrainer(
        model=model, args=config, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=_newest_complete(folder))
    return {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}


def _newest_complete(folder: Path) -> str | None:
    """The newest of `Trainer`'s checkpoints in a folder that has its state, which is written last; None for none."""
    from transformers import TrainerState

    found = {}
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # cut off
            found[TrainerState.load_from_json(str(file)).global_step] = str(file.parent)
    return found[max(found)] if found else None

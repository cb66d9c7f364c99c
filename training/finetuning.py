"""Fine-tuning a base model for chat: the chat template, and TRL's trainer with this project's settings."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from data_prep.common.command_line import UserError, option
from data_prep.common.schema import STRICT, Count, Positive

# ChatML's marks of a turn.
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def add_chat_template(model: Any, tokenizer: Any) -> None:
    """Adds ChatML's tokens, embeddings for them, and a chat template to a base model, in place. A chat model keeps its
    own.

    Raises:
        UserError: for a tokenizer without end of text, and a chat template that does not mark what is learned.
    """
    if tokenizer.chat_template is not None:
        if "generation" not in tokenizer.chat_template:
            raise UserError("the model's chat template has no {% generation %} marks, which tell what is learned")
        return
    if tokenizer.eos_token is None:
        raise UserError("the model's tokenizer has no end-of-text token (eos_token), which conversations begin with")
    from tokenizers import AddedToken
    from transformers.utils import logging

    end_of_text = tokenizer.eos_token_id
    tokenizer.bos_token = tokenizer.eos_token
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (TURN_START, TURN_END)]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.eos_token = tokenizer.pad_token = TURN_END
    tokenizer.chat_template = _TEMPLATE.read_text(encoding="utf-8").rstrip()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers explains at length how it chooses the new rows
    model.resize_token_embeddings(max(model.config.vocab_size, 1 + max(tokenizer.get_vocab().values())))
    logging.set_verbosity(level)
    turn_end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.pad_token_id = end_of_text, turn_end
    model.config.eos_token_id = turn_end
    model.generation_config.eos_token_id = [turn_end, end_of_text]


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[int, bool]]:
    """Tokens of a conversation, each with whether it counts in the loss."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return [(token, bool(learned)) for token, learned in zip(found["input_ids"], found["assistant_masks"], strict=True)]


def show(tokenizer: Any, rendered: list[tuple[int, bool]], color: bool) -> str:
    """Text of each token; learned tokens are green with `color`, otherwise in brackets."""
    marked = "\033[30;42m{}\033[0m" if color else "[{}]"
    return "".join((marked if learned else "{}").format(tokenizer.decode(token)) for token, learned in rendered)


_WARMUP, _SAVED = 0.1, 0.1  # of all steps
_NAMED_AS_THERE = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
                   "seed")  # fmt: skip
PositiveFloat = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class FinetuningSettings:
    """Fine-tuning settings, named as in `transformers.TrainingArguments`."""

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
    """Trains `model` in place on the assistant's tokens in packed conversations.

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
    """Newest of `Trainer`'s checkpoints whose state file, written last, is complete; None if there is none."""
    from transformers import TrainerState

    found = {}
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # cut off
            found[TrainerState.load_from_json(str(file)).global_step] = str(file.parent)
    return found[max(found)] if found else None

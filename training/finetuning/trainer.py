"""TRL's `SFTTrainer` with the settings of this project."""

import contextlib
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_prep.common.command_line import option
from data_prep.reading.docstrings import Conversation
from eval.common.devices import chosen_precision
from eval.common.launch import on_cpu
from modeling import GPTModel

_LORA_MATRICES = ["c_attn", "c_fc", "c_proj"]
_WARMUP, _SAVED = 0.1, 0.1  # of all steps


@dataclass(frozen=True)
class FinetuningSettings:
    """Settings of the training, named as in `transformers.TrainingArguments` and `peft.LoraConfig`."""

    learning_rate: float = option(3e-4, "AdamW's largest, reached after a tenth of the steps", type=float)
    num_train_epochs: float = option(1.0, "passes over the conversations", type=float)
    max_steps: int = option(-1, "optimizer steps, instead of passes; -1 for none", type=int)
    per_device_train_batch_size: int = option(4, "rows of max_length tokens at a time", type=int)
    gradient_accumulation_steps: int = option(1, "batches in a step", type=int)
    lora_r: int = option(0, "rank of LoRA matrices, which are merged at the end; 0 trains all weights", type=int)
    mixed_precision: str = option("auto", "auto is the fastest of the hardware", choices=["auto", "no", "bf16", "fp16"])
    seed: int = option(0, "of the order and of new weights", type=int)

    def problems(self) -> list[str]:
        """What is out of bounds."""
        positive = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
        found = [
            f"{name}={getattr(self, name)} must be greater than 0" for name in positive if getattr(self, name) <= 0
        ]
        found += [
            f"{name}={getattr(self, name)} must be at least 0" for name in ("lora_r", "seed") if getattr(self, name) < 0
        ]
        if self.max_steps == 0 or self.max_steps < -1:
            found.append(f"max_steps={self.max_steps} must be at least 1, or -1")
        return found


def finetune(
    model: GPTModel,
    tokenizer: Any,
    new_tokens: list[int],
    train: list[Conversation],
    held_out: list[Conversation],
    max_length: int,
    settings: FinetuningSettings,
    folder: Path,
) -> tuple[Any, dict[int, float]]:
    """Trains `model` on the assistant's tokens of packed conversations.

    Args:
        folder: for `Trainer`'s checkpoints, one after each tenth of the steps; the newest of an earlier call is resumed
            from.
        new_tokens: ids whose embeddings are trained beside LoRA's matrices.

    Returns:
        The trained model with LoRA merged, and the losses of the held-out conversations, in nats per token of the
        assistant, by the number of steps before them.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import SFTTrainer

    disable_progress_bars()
    trainer: Any = SFTTrainer(
        model=model,
        args=_config(max_length, settings, folder),
        train_dataset=Dataset.from_list([{"messages": messages} for messages in train]),
        eval_dataset=Dataset.from_list([{"messages": messages} for messages in held_out]),
        processing_class=tokenizer,
        peft_config=_lora(settings.lora_r) if settings.lora_r else None,
        callbacks=[_print_losses()],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.lora_r and new_tokens:
        _train_rows(trainer.model.get_input_embeddings().weight, new_tokens)
        # Without it their checkpoints would lack the embeddings, of which PEFT does not know that they are trained.
        trainer.model.save_pretrained = partial(trainer.model.save_pretrained, save_embedding_layers=True)
    trainer.train(resume_from_checkpoint=_newest_complete(folder))
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    trained = trainer.accelerator.unwrap_model(trainer.model)
    return trained.merge_and_unload() if settings.lora_r else trained, losses


def _newest_complete(folder: Path) -> str | None:
    """The newest of `Trainer`'s checkpoints in a folder that has its state, which is written last; None for none."""
    from transformers import TrainerState

    found = {}
    for file in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(ValueError):  # cut off
            found[TrainerState.load_from_json(str(file)).global_step] = str(file.parent)
    return found[max(found)] if found else None


def _config(max_length: int, settings: FinetuningSettings, output_dir: Path) -> Any:
    from trl import SFTConfig

    precision = chosen_precision(settings.mixed_precision)
    with warnings.catch_warnings():  # transformers 5.24 renames it, those before know this name only
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        return SFTConfig(
            output_dir=str(output_dir),
            max_length=max_length,
            packing=True,
            assistant_only_loss=True,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=_WARMUP,
            weight_decay=0.0,
            num_train_epochs=settings.num_train_epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.per_device_train_batch_size,
            per_device_eval_batch_size=settings.per_device_train_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            gradient_checkpointing=False,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=on_cpu(),
            ddp_find_unused_parameters=False,
            seed=settings.seed,
            eval_on_start=True,
            eval_strategy="epoch",
            save_strategy="steps",
            save_steps=_SAVED,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        )


def _print_losses() -> Any:
    """A callback that prints the losses as the pre-trainer does."""
    from transformers import TrainerCallback

    class PrintLosses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")):
                if key in logs and state.is_local_process_zero:
                    print(f"step {state.global_step:6}/{state.max_steps}  {name} {logs[key]:.4f}", flush=True)

    return PrintLosses()


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=_LORA_MATRICES, fan_in_fan_out=True
    )


def _train_rows(weight: torch.Tensor, rows: list[int]) -> None:
    """Trains these rows of a frozen embedding: AdamW without decay leaves alone what has no gradient.

    PEFT's `trainable_token_indices` wraps the head, whose weight TRL's loss then does not find.
    """
    kept = torch.zeros(len(weight), 1, device=weight.device)
    kept[rows] = 1
    weight.requires_grad_(True)
    weight.register_hook(lambda gradient: gradient * kept.to(gradient))

"""The loss on the validation split."""

from dataclasses import dataclass
from typing import Any

from eval.common.scores import bits_per_byte
from eval.loss import summed_loss
from training.engine.batches import Batches
from training.engine.data import Data, validation_sequences
from training.loop.run import Run
from training.settings.config import TrainingConfig


@dataclass
class Validation:
    """The loss on the same first sequences of the validation split each time.

    Attributes:
        val_data, train_data: the batches of both splits.
        sequences: of one validation.
        text_bytes: of the text that their labels stand for; None if neither the tokens nor the manifests tell it.
    """

    every: int
    val_data: Batches
    train_data: Batches
    sequences: int
    text_bytes: int | None
    at_start: bool = True
    at_checkpoints: bool = True

    @classmethod
    def prepare(cls, config: TrainingConfig, data: Data, train_data: Batches, tokenizer: Any) -> "Validation":
        """Reads the labels once, for the size of their text."""
        val_data = data.batches(config, "val")
        sequences = validation_sequences(val_data, config.evaluation.val_tokens)
        text_bytes = data.val_text_bytes(val_data, sequences, tokenizer)
        return cls(config.evaluation.eval_steps, val_data, train_data, sequences, text_bytes)

    def run(self, run: Run) -> dict[str, Any]:
        """Loss in nats per token, and bits per byte of text. Collective: each rank takes its part of the sequences."""
        accelerator, step = run.accelerator, run.state.step
        batches = self.val_data.for_rank(
            self.sequences, run.micro_batch, accelerator.process_index, accelerator.num_processes
        )
        nats, tokens = run.sum_over_processes(*summed_loss(run.bare_model, batches, run.check_stop))
        losses = {"val_loss": nats / tokens}
        shown = "bits per byte not available"
        if self.text_bytes:
            losses["val_bits_per_byte"] = bits_per_byte(nats, self.text_bytes)
            shown = f"{losses['val_bits_per_byte']:.3f} bits per byte"
        run.log.print(f"step {step:>6}  validation loss {losses['val_loss']:.4f}, {shown}")
        consumed = run.data.consumed(self.train_data, run.state.position)
        for folder, read in consumed.items() if len(consumed) > 1 else ():
            run.log.print(
                f"{'':13}{folder}: {read['share']:.1%}, {read['tokens']:,} tokens, {read['epochs']:.2f} epochs"
            )
        run.log.note(data=consumed)
        return losses

"""A tiny model and its training in this process, for tests of the parts of a step."""

import torch
from accelerate import Accelerator

from modeling import GPTConfig, GPTModel
from training.engine.optimizer import make_optimizer
from training.engine.step import training_step
from training.settings.schema import OptimizerSettings

SEQUENCES, LENGTH, VOCAB_SIZE, STEPS = 8, 24, 301, 20


def make_model(**options) -> GPTModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPTModel._from_config(GPTConfig(**sizes), **options).train()


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """Text that repeats itself, so that there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    starts = torch.randint(VOCAB_SIZE, (steps, SEQUENCES, 1), generator=generator)
    tokens = (starts + 7 * torch.arange(LENGTH + 1)) % VOCAB_SIZE
    return [{"input_ids": t[:, :-1].contiguous(), "shift_labels": t[:, 1:].contiguous()} for t in tokens]


def train(
    model: GPTModel, micro_batches: int = 1, steps: int = STEPS, accelerator: Accelerator | None = None, **settings
) -> torch.Tensor:
    """The losses of some steps, in float32 if no accelerator is given."""
    accelerator = accelerator or Accelerator(cpu=True, mixed_precision="no")
    optimizer = make_optimizer(model, OptimizerSettings(**{"optim": "adamw", "learning_rate": 1e-2} | settings))
    model, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for batch in batches(steps):
        size = SEQUENCES // micro_batches
        parts = [{name: t[i : i + size] for name, t in batch.items()} for i in range(0, SEQUENCES, size)]
        losses.append(training_step(accelerator, model, optimizer, parts, max_grad_norm=1.0)["loss"])
    return torch.stack(losses)

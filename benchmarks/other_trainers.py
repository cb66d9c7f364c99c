"""Other trainers on the data of `benchmarks.time_to_loss`, each by its own recipe.

    python -m benchmarks.other_trainers build-nanogpt FOLDER --learning_rate 1e-3 --seed 1 --steps 800

Each prints its bits per byte on the whole held-out text ten times during its run. OpenMP's threads wait as libgomp has
them wait by default, which is faster for small operations on a quiet machine.
"""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.training_step import QUICKSTART, PlainGPT, Size
from data_prep.common.command_line import ArgumentParser, run

_EVALUATIONS = 10
_MODEL = {"n_layer": QUICKSTART.n_layer, "n_embd": QUICKSTART.n_embd, "n_head": QUICKSTART.n_head}
_BATCH, _LENGTH = 8, 256
_DEMO = Size(n_layer=4, n_embd=128, n_head=4, vocab_size=256, length=64, micro_batch=12, accumulation=1)


def tokens_of(folder: Path, split: str) -> Tensor:
    """The tokens of a split of a data folder, `[N]` int64."""
    return torch.cat([torch.from_numpy(np.load(path).astype(np.int64)) for path in sorted(folder.glob(f"*_{split}_*"))])


def held_out_bits(loss_of: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, length: int, text_bytes: int) -> float:
    """Bits per byte of held-out text, by sequences side by side.

    Args:
        loss_of: mean nats of labels `[B, T]` after inputs `[B, T]`.
        text_bytes: bytes of text that the tokens stand for.
    """
    count = (len(tokens) - 1) // length
    rows = tokens[: count * length + 1]
    x, y = rows[:-1].view(count, length), rows[1:].view(count, length)
    nats = sum(loss_of(a, b).item() * a.numel() for a, b in zip(x.split(_BATCH), y.split(_BATCH), strict=True))
    return nats / math.log(2) / (text_bytes * count * length / (len(tokens) - 1))


class Reporter:
    """Evaluates and prints ten times in a run."""

    def __init__(self, model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, length: int,
                 text_bytes: int, steps: int) -> None:  # fmt: skip
        self.model, self.steps, self.every = model, steps, max(1, steps // _EVALUATIONS)
        self.arguments = (loss_of, tokens, length, text_bytes)

    def step(self, done: int) -> None:
        if done % self.every == 0 or done == self.steps:
            self.model.eval()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=_bf16()):
                print(f"step {done} {held_out_bits(*self.arguments):.3f} bits per byte", flush=True)
            self.model.train()


def build_nanogpt(folder: Path, learning_rate: float, steps: int) -> None:
    """build-nanogpt's loop, compiled: sequential batches, AdamW (0.9, 0.95), decay 0.1, warmup over 715 / 19,073 of the
    steps, cosine to a tenth, clipping at 1."""
    about = json.loads((folder / "text.json").read_text())
    size = Size(**_MODEL, vocab_size=about["vocab_size"], length=_LENGTH, micro_batch=_BATCH, accumulation=1)
    model = PlainGPT(size)
    forward: Any = torch.compile(model)
    train, held_out = tokens_of(folder, "train"), tokens_of(folder, "val")
    optimizer = torch.optim.AdamW(_groups(model), lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    reporter = Reporter(model, model, held_out, _LENGTH, about["held_out_bytes"], steps)
    warmup, position, amount = max(1, steps * 715 // 19073), 0, _BATCH * _LENGTH
    for step in range(steps):
        if position + amount + 1 > len(train):
            position = 0
        rows = train[position : position + amount + 1]
        position += amount
        x, y = rows[:-1].view(_BATCH, _LENGTH), rows[1:].view(_BATCH, _LENGTH)
        factor = (step + 1) / warmup if step < warmup else _cosine(step, warmup, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=_bf16()):
            loss = forward(x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        reporter.step(step + 1)


def nanogpt_demo(folder: Path, learning_rate: float, steps: int) -> None:
    """nanoGPT's demo for a CPU: 4 layers of 128, characters, contexts of 64, batches of 12 at random offsets, AdamW
    (0.9, 0.99), 100 steps of warmup, cosine to a tenth, not compiled."""
    train = torch.from_numpy(np.frombuffer((folder / "train.txt").read_bytes(), dtype=np.uint8).astype(np.int64))
    text = (folder / "held_out.txt").read_bytes()
    held_out = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
    model = PlainGPT(_DEMO)
    optimizer = torch.optim.AdamW(_groups(model), lr=learning_rate, betas=(0.9, 0.99))
    reporter = Reporter(model, model, held_out, _DEMO.length, len(text) - 1, steps)
    for step in range(steps):
        starts = torch.randint(len(train) - _DEMO.length, (_DEMO.micro_batch,))
        rows = torch.stack([train[start : start + _DEMO.length + 1] for start in starts])
        factor = (step + 1) / 100 if step < 100 else _cosine(step, 100, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * factor
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        reporter.step(step + 1)


def hf_trainer(folder: Path, learning_rate: float, steps: int) -> None:
    """Stock GPT-2 in transformers' `Trainer`, compiled: shuffled rows, linear decay, the rest its defaults."""
    from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    about = json.loads((folder / "text.json").read_text())
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**_MODEL, **dropout, vocab_size=about["vocab_size"], n_positions=_LENGTH))
    train, held_out = tokens_of(folder, "train"), tokens_of(folder, "val")
    rows = train[: len(train) // _LENGTH * _LENGTH].view(-1, _LENGTH)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        logits = model(input_ids=x, use_cache=False).logits
        return nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))

    reporter = Reporter(model, loss_of, held_out, _LENGTH, about["held_out_bytes"], steps)

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reporter.step(state.global_step)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=_BATCH,
        learning_rate=learning_rate,
        warmup_steps=steps // 20,
        weight_decay=0.1,
        bf16=_bf16(),
        torch_compile=True,
        max_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=torch.initial_seed() % 2**31,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Report()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters with a decay of 0.1, and biases and norms without."""
    decayed, others = ([p for p in model.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False))
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def _cosine(step: int, warmup: int, steps: int) -> float:
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _bf16() -> bool:
    from eval.common.devices import bf16_is_fast

    return bf16_is_fast()


TRAINERS = {"build-nanogpt": build_nanogpt, "nanoGPT's CPU demo": nanogpt_demo, "Trainer": hf_trainer}


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.other_trainers", __doc__)
    parser.add_argument("trainer", choices=list(TRAINERS), help="the trainer")
    parser.add_argument("folder", type=Path, help="made by benchmarks.time_to_loss")
    parser.add_option("learning_rate", type=float, required=True, help="peak")
    parser.add_option("seed", type=int, default=1, help="of weights and batches")
    parser.add_option("steps", type=int, required=True, help="length of the run")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    TRAINERS[args.trainer](args.folder, args.learning_rate, args.steps)


if __name__ == "__main__":
    run(main)

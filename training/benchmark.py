"""How fast a training step is, and how much memory it takes, beside build-nanogpt's and transformers' `Trainer`.

    python -m training.benchmark [--sizes quickstart small gpt2-124m] [--contenders ...]

Each contender lives in a process of its own, with the same weights' sizes, batch, precision and optimizer. They take
turns, a few steps each, so that what disturbs the machine disturbs all of them; ratios are medians of those within a
round.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_prep.cli import ArgumentParser, UserError, run
from eval.launch import make_accelerator
from eval.models import compile_blocks
from modeling import GPTConfig, GPTModel, flops_per_token
from training.meter import peak_memory
from training.optimizer import make_optimizer
from training.precision import peak_flops
from training.settings import OptimizerSettings
from training.step import training_step
from training.topology import describe_device

_LEARNING_RATE = 6e-4


@dataclass(frozen=True)
class Size:
    """A model, and its batch: `accumulation` micro-batches of `micro_batch` sequences of `length` tokens."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    length: int
    micro_batch: int
    accumulation: int

    @property
    def config(self) -> GPTConfig:
        sizes = {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": self.n_head}
        return GPTConfig(vocab_size=self.vocab_size, n_positions=self.length, **sizes)

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.micro_batch * self.length * self.accumulation


SIZES = {
    "quickstart": Size(3, 192, 3, 4096, 256, 8, 1),
    "small": Size(6, 384, 6, 50257, 256, 8, 1),
    "gpt2-124m": Size(12, 768, 12, 50257, 1024, 2, 1),
}

Step = Callable[[int], None]  # runs so many optimizer steps


def batches(size: Size, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Endless batches of random tokens: inputs and labels `[micro_batch, length]` for each micro-batch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        shape = (size.accumulation, size.micro_batch, size.length + 1)
        tokens = torch.randint(size.vocab_size, shape, generator=generator)
        yield [(ids[:, :-1].to(device), ids[:, 1:].to(device)) for ids in tokens]


def engine(size: Size, precision: str, compiled: bool) -> Step:
    """This project's step."""
    accelerator = make_accelerator(mixed_precision=precision)
    torch.manual_seed(0)
    model = GPTModel(size.config).train()
    if accelerator.device.type == "cpu" and size.length <= 512:
        model.set_attn_implementation("eager")
    if compiled:
        compile_blocks(model)
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=_LEARNING_RATE))
    model, optimizer = accelerator.prepare(model, optimizer)
    source = batches(size, accelerator.device)

    def steps(count: int) -> None:
        for _ in range(count):
            micro_batches = [{"input_ids": x.contiguous(), "shift_labels": y.contiguous()} for x, y in next(source)]
            results = training_step(accelerator, model, optimizer, micro_batches, max_grad_norm=1.0)
        results["loss"].item()

    return steps


def prepare_device() -> torch.device:
    """The device of a contender that is not ours, with all cores where it is the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch.device("cpu")


class PlainGPT(nn.Module):
    """GPT-2 as "Let's reproduce GPT-2 (124M)" has it: all logits at once, a vocabulary padded to a multiple of 128."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        c, vocab_size = size.n_embd, -(-size.vocab_size // 128) * 128
        self.n_head = size.n_head
        self.wte, self.wpe = nn.Embedding(vocab_size, c), nn.Embedding(size.length, c)
        self.h = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(c),
                    "c_attn": nn.Linear(c, 3 * c),
                    "c_proj": nn.Linear(c, c),
                    "ln_2": nn.LayerNorm(c),
                    "mlp": nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(approximate="tanh"), nn.Linear(4 * c, c)),
                }
            )
            for _ in range(size.n_layer)
        )
        self.ln_f = nn.LayerNorm(c)
        self.lm_head = nn.Linear(c, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.wte(ids) + self.wpe(torch.arange(t, device=ids.device))
        for block in self.h:
            qkv = block["c_attn"](block["ln_1"](x)).view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + block["c_proj"](y.transpose(1, 2).reshape(b, t, -1))
            x = x + block["mlp"](block["ln_2"](x))
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1))


def build_nanogpt(size: Size, precision: str, compiled: bool) -> Step:
    """A re-statement of build-nanogpt's step: autocast around the forward pass, a loss that is waited for each step."""
    device = prepare_device()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = PlainGPT(size).to(device)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    # It asks for the fused optimizer on CUDA only; here all contenders have the same.
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if compiled else model
    source = batches(size, device)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            accumulated = torch.zeros((), device=device)
            for x, y in next(source):
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = forward(x, y)
                loss = loss / size.accumulation
                accumulated += loss.detach()
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE
            optimizer.step()
            accumulated.item()

    return steps


def trainer(size: Size, precision: str, compiled: bool) -> Step:
    """Stock `GPT2LMHeadModel` in transformers' `Trainer`, from its first step's end to its last's."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    prepare_device()
    torch.manual_seed(0)
    values = size.config.to_dict() | {"architectures": None, "model_type": "gpt2"}
    model = GPT2LMHeadModel(GPT2Config.from_dict(values))
    rows = torch.randint(size.vocab_size, (size.micro_batch * size.accumulation * 64, size.length))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=size.micro_batch,
        gradient_accumulation_steps=size.accumulation,
        learning_rate=_LEARNING_RATE,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=precision == "bf16",
        torch_compile=compiled,
        max_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not torch.accelerator.is_available(),
    )

    class Watch(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                Watch.started = time.perf_counter()

    data = [{"input_ids": row, "labels": row} for row in rows]
    trained = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Watch()])

    def steps(count: int) -> float:
        trained.args.max_steps = count
        trained.train()
        return time.perf_counter() - Watch.started

    return steps


CONTENDERS: dict[str, Callable[[Size, str], Step]] = {
    "gpt-accelerate": partial(engine, compiled=False),
    "gpt-accelerate, compiled": partial(engine, compiled=True),
    "build-nanogpt": partial(build_nanogpt, compiled=False),
    "build-nanogpt, compiled": partial(build_nanogpt, compiled=True),
    "Trainer": partial(trainer, compiled=False),
}


def contend(connection: Any, name: str, size: Size, precision: str) -> None:
    """Be one contender: do as many steps as the connection says, and answer with the seconds that they took."""
    steps = CONTENDERS[name](size, precision)
    cuda = torch.cuda.is_available()
    while (count := connection.recv()) > 0:
        started = time.perf_counter()
        seconds = steps(count)
        if cuda:
            torch.cuda.synchronize()
        seconds = seconds or time.perf_counter() - started
        device = torch.device("cuda" if cuda else "cpu")
        connection.send((seconds, peak_memory(device)))
        if cuda:
            torch.cuda.empty_cache()  # the others' turn


def race(size: Size, names: list[str], precision: str, steps: int, rounds: int) -> dict[str, tuple[list[float], int]]:
    """Tokens per second of each contender in each round, and its peak memory in bytes."""
    context = get_context("spawn")
    connections, processes = {}, []
    try:
        for name in names:
            connections[name], other = context.Pipe()
            process = context.Process(target=contend, args=(other, name, size, precision))
            process.start()
            other.close()
            processes.append(process)
            connections[name].send(3)  # compilation and the first allocations are not timed
            connections[name].recv()
        results: dict[str, tuple[list[float], int]] = {name: ([], 0) for name in names}
        for _ in range(rounds):
            for name, connection in connections.items():
                connection.send(steps)
                seconds, memory = connection.recv()
                results[name] = ([*results[name][0], steps * size.tokens / seconds], memory)
        return results
    except EOFError:
        raise UserError(f"{name} has failed; its error is above") from None
    finally:
        for name, process in zip(connections, processes, strict=False):
            if process.is_alive():
                connections[name].send(0)
            process.join()


def table(size: Size, results: dict[str, tuple[list[float], int]], precision: str) -> str:
    """Speeds, ratios to the first contender within rounds, MFU where the peak is known, and memory."""
    first = next(iter(results.values()))[0]
    peak = peak_flops(describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")), precision)
    lines = ["| | tokens/s (spread) | of the first (spread) | MFU | peak memory |", "|---|---|---|---|---|"]
    for name, (speeds, memory) in results.items():
        ratios = [speed / base for speed, base in zip(speeds, first, strict=True)]
        mfu = flops_per_token(size.config, size.length) * statistics.median(speeds) / peak if peak else None
        lines.append(
            f"| {name} | {_spread(speeds, ',.0f')} | {_spread(ratios, '.2f')} | {f'{mfu:.1%}' if mfu else '-'} | "
            f"{memory / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    parser = ArgumentParser(prog="python -m training.benchmark", description=__doc__.split("\n")[0])
    parser.add_option("sizes", nargs="+", default=["quickstart", "small"], choices=list(SIZES), help="models")
    parser.add_option(
        "contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), help="who takes part"
    )
    parser.add_option("precision", default="bf16", choices=["bf16", "no"], help="of the arithmetic")
    parser.add_option("micro_batch", type=int, help="sequences in a forward pass, in place of the size's own")
    parser.add_option("accumulation", type=int, help="micro-batches in a step, in place of the size's own")
    parser.add_option("steps", type=int, default=5, help="steps in a turn")
    parser.add_option("rounds", type=int, default=5, help="turns of each")
    args = parser.parse_args()
    for name in args.sizes:
        size = SIZES[name]
        size = replace(
            size,
            micro_batch=args.micro_batch or size.micro_batch,
            accumulation=args.accumulation or size.accumulation,
        )
        device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        print(
            f"\n{name}: {size.n_layer} layers x {size.n_embd}, vocabulary {size.vocab_size}, {size.accumulation} x "
            f"{size.micro_batch} x {size.length} tokens a step, {args.precision}, {device}, "
            f"torch {torch.__version__}\n",
            flush=True,
        )
        print(table(size, race(size, args.contenders, args.precision, args.steps, args.rounds), args.precision))


if __name__ == "__main__":
    run(main)

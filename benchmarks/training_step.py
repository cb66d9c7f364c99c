"""Speed and memory of a training step, beside build-nanogpt's, stock GPT-2 in a plain loop, and the `Trainer`.

    python -m benchmarks.training_step [--sizes quickstart small gpt2-124m] [--implementations ...]

All have the same model, batch, precision and optimizer, and run a few steps at a time, interleaved. Ratios are medians
of the ratios within a round. OpenMP's threads wait as each trainer has them wait.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleaved import Setup, Workload, run_interleaved, spread
from data_prep.common.command_line import ArgumentParser, run
from eval.common.devices import make_accelerator
from eval.common.models import compile_blocks
from modeling import GPTConfig, GPTModel, flops_per_token
from training.engine.distributed import describe_device
from training.engine.optimizer import make_optimizer
from training.engine.step import training_step
from training.monitoring.metrics import peak_flops
from training.settings.schema import ModelSettings, OptimizerSettings

_LEARNING_RATE = 6e-4


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of its batch: `accumulation` micro-batches of `micro_batch` sequences of `length` tokens."""

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
        """Tokens per step."""
        return self.micro_batch * self.length * self.accumulation


QUICKSTART = ModelSettings()
SIZES = {
    "quickstart": Size(QUICKSTART.n_layer, QUICKSTART.n_embd, QUICKSTART.n_head, 4096, 256, 8, 1),
    "small": Size(6, 384, 6, 50257, 256, 8, 1),
    "gpt2-124m": Size(12, 768, 12, 50257, 1024, 2, 1),
}

Steps = Callable[[int], float | None]  # runs N optimizer steps; may return their seconds


def batches(size: Size, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields random batches without end: inputs and labels `[micro_batch, length]` of each micro-batch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        shape = (size.accumulation, size.micro_batch, size.length + 1)
        tokens = torch.randint(size.vocab_size, shape, generator=generator)
        yield [(ids[:, :-1].to(device), ids[:, 1:].to(device)) for ids in tokens]


def engine(size: Size, precision: str, compiled: bool, optim: Literal["adamw", "muon"] = "adamw") -> Steps:
    """Returns steps of this project."""
    accelerator = make_accelerator(mixed_precision=precision)
    torch.manual_seed(0)
    model = GPTModel(size.config).train()
    if accelerator.device.type == "cpu" and size.length <= 512:
        model.set_attn_implementation("eager")
    if compiled:
        compile_blocks(model)
    optimizer = make_optimizer(model, OptimizerSettings(learning_rate=_LEARNING_RATE, optim=optim), precision)
    model, optimizer = accelerator.prepare(model, optimizer)
    source = batches(size, accelerator.device)

    def steps(count: int) -> None:
        for _ in range(count):
            micro_batches = [{"input_ids": x.contiguous(), "shift_labels": y.contiguous()} for x, y in next(source)]
            results = training_step(accelerator, model, optimizer, micro_batches, max_grad_norm=1.0)
        results["loss"].item()

    return steps


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class PlainGPT(nn.Module):
    """GPT-2 as in "Let's reproduce GPT-2 (124M)": all logits at once, vocabulary padded to a multiple of 128."""

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


def build_nanogpt(size: Size, precision: str, compiled: bool) -> Steps:
    """Returns steps as build-nanogpt runs them: autocast in the forward pass, a synchronization after each step."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = PlainGPT(size).to(device())
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    # build-nanogpt uses the fused optimizer on CUDA only; here all implementations use it.
    optimizer = torch.optim.AdamW(groups, lr=_LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    forward = torch.compile(model) if compiled else model
    source = batches(size, device())

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            accumulated = torch.zeros((), device=device())
            for x, y in next(source):
                with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
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


def stock_gpt2(size: Size, precision: str, compiled: bool) -> Steps:
    """Returns steps of stock `GPT2LMHeadModel` in a plain loop, with the same optimizer."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(_stock_config(size)).to(device()).train()
    forward = torch.compile(model) if compiled else model
    optimizer = make_optimizer(model, OptimizerSettings(optim="adamw", learning_rate=_LEARNING_RATE))
    source = batches(size, device())

    def steps(count: int) -> None:
        for _ in range(count):
            for x, y in next(source):
                with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = forward(input_ids=x, use_cache=False).logits
                    loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), y.reshape(-1))
                (loss / size.accumulation).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()

    return steps


def _stock_config(size: Size) -> Any:
    from transformers import GPT2Config

    return GPT2Config.from_dict(size.config.to_dict() | {"architectures": None, "model_type": "gpt2"})


def trainer(size: Size, precision: str, compiled: bool) -> Steps:
    """Returns steps of stock `GPT2LMHeadModel` in transformers' `Trainer`, timed without its preparations."""
    from transformers import GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(_stock_config(size))
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

    class Timer(TrainerCallback):
        started = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                Timer.started = time.perf_counter()

    data = [{"input_ids": row, "labels": row} for row in rows]
    trained = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Timer()])
    trained.remove_callback(PrinterCallback)

    def steps(count: int) -> float:
        trained.args.max_steps = count
        trained.train()
        return time.perf_counter() - Timer.started

    return steps


def step_workload(name: str, size: Size, precision: str, count: int) -> Workload:
    """Returns a workload of `count` steps."""
    return partial(IMPLEMENTATIONS[name](size, precision), count)


IMPLEMENTATIONS: dict[str, Callable[[Size, str], Steps]] = {
    "gpt-accelerate": partial(engine, compiled=False),
    "gpt-accelerate, Muon": partial(engine, compiled=False, optim="muon"),
    "gpt-accelerate, compiled": partial(engine, compiled=True),
    "build-nanogpt": partial(build_nanogpt, compiled=False),
    "build-nanogpt, compiled": partial(build_nanogpt, compiled=True),
    "GPT-2, compiled": partial(stock_gpt2, compiled=True),
    "Trainer": partial(trainer, compiled=False),
    "Trainer, compiled": partial(trainer, compiled=True),
}


def table(size: Size, precision: str, speeds: dict[str, list[float]], memory: dict[str, int]) -> str:
    """Returns tokens per second, ratios of the first implementation to each within rounds, MFU if known, memory."""
    first = next(iter(speeds.values()))
    peak = peak_flops(describe_device(device()), precision)
    lines = [
        "| | tokens/s (spread) | speed of the first / its own (spread) | MFU | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, own in speeds.items():
        ratios = [base / speed for speed, base in zip(own, first, strict=True)]
        mfu = f"{flops_per_token(size.config, size.length) * statistics.median(own) / peak:.1%}" if peak else "-"
        lines.append(
            f"| {name} | {spread(own, ',.0f')} | {spread(ratios, '.2f')} | {mfu} | {memory[name] / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.training_step", __doc__)
    parser.add_option("sizes", nargs="+", default=["quickstart", "small"], choices=list(SIZES), help="models")
    known = list(IMPLEMENTATIONS)
    parser.add_option("implementations", nargs="+", default=known, choices=known, help="those to measure")
    parser.add_option("precision", default="bf16", choices=["bf16", "no"], help="of the arithmetic")
    parser.add_option("micro_batch", type=int, help="sequences in a forward pass, instead of those of the size")
    parser.add_option("accumulation", type=int, help="micro-batches in a step, instead of those of the size")
    parser.add_option("steps", type=int, default=5, help="steps in a round")
    parser.add_option("rounds", type=int, default=5, help="rounds of measurements")
    args = parser.parse_args()
    for name in args.sizes:
        size = SIZES[name]
        size = replace(
            size,
            micro_batch=args.micro_batch or size.micro_batch,
            accumulation=args.accumulation or size.accumulation,
        )
        print(
            f"\n{name}: {size.n_layer} layers x {size.n_embd}, vocabulary {size.vocab_size}, {size.accumulation} x "
            f"{size.micro_batch} x {size.length} tokens a step, {args.precision}, "
            f"{describe_device(device())}, torch {torch.__version__}\n",
            flush=True,
        )
        setups: dict[str, Setup] = {
            name: partial(step_workload, name, size, args.precision, args.steps) for name in args.implementations
        }
        ours = [name for name in args.implementations if name.startswith("gpt-accelerate")]
        as_in_commands = {name: {"GOMP_SPINCOUNT": "1000"} for name in ours}
        results = run_interleaved(setups, args.rounds, as_in_commands)
        speeds = {name: [args.steps * size.tokens / one for one in seconds] for name, (seconds, _) in results.items()}
        print(table(size, args.precision, speeds, {name: memory for name, (_, memory) in results.items()}), flush=True)


if __name__ == "__main__":
    run(main)

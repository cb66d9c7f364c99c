"""Speed of HellaSwag and generation, beside build-nanogpt's loop over items and stock `generate()`.

python -m benchmarks.evaluation runs/quickstart/checkpoints/step_00001000 --data hellaswag_val.jsonl

Implementations run interleaved, each in its own process, with the same weights and items. Ratios are medians of the
ratios within a round.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.common.command_line import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before torch is loaded

import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from benchmarks.interleaved import Setup, Workload, run_interleaved, spread
from data_prep.common.command_line import ArgumentParser, UserError, run
from eval.common.devices import make_accelerator
from eval.common.generation import Sampling, generate
from eval.common.models import compile_blocks, load_model
from eval.hellaswag import HellaSwag, read_items

_STOCK, _OURS_ONE_BY_ONE = "one item at a time, stock GPT-2", "one item at a time, GPTModel"
_OURS, _COMPILED = "this project", "this project, compiled"


@torch.no_grad()
def one_item_at_a_time(
    model: Any, tokenize: Callable[[str], list[int]], items: list[dict[str, Any]]
) -> Iterator[tuple[list[float], list[float]]]:
    """Yields summed and mean loss of the endings of each item as build-nanogpt does: four padded rows per item.

    Args:
        model: returns logits, as stock GPT-2.
    """
    for item in items:
        context = tokenize(item["ctx"])
        endings = [tokenize(" " + ending) for ending in item["endings"]]
        width = len(context) + max(map(len, endings))
        rows = [context + ending + [0] * (width - len(context) - len(ending)) for ending in endings]
        tokens = torch.tensor(rows, device=model.device)
        logits = model(tokens).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(endings), -1)[:, len(context) - 1 :]
        lengths = torch.tensor([len(ending) for ending in endings], device=model.device)
        sums = losses.where(torch.arange(losses.shape[1], device=model.device) < lengths[:, None], 0).sum(dim=1)
        yield sums.tolist(), (sums / lengths).tolist()


def fitting(items: list[dict[str, Any]], tokenizer: Any, context: int) -> list[dict[str, Any]]:
    """Returns the items that fit into the model's context; `one_item_at_a_time` does not truncate."""
    task = HellaSwag.prepare(items, "completion", tokenizer)
    return [
        item
        for item, question in zip(items, task.questions, strict=True)
        if len(question.context) + max(map(len, question.endings)) <= context
    ]


def hellaswag_workload(name: str, source: str, data: Path | None, count: int, precision: str) -> Workload:
    """Returns a workload that tokenizes and scores `count` items by the completion rule."""
    if name in (_STOCK, _OURS_ONE_BY_ONE):
        model, tokenizer = load_model(source)
        if name == _STOCK:
            model = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32).eval().to(device())
    else:
        accelerator = make_accelerator()
        model, tokenizer = load_model(source)
        if name == _COMPILED:
            compile_blocks(model)
    usable = fitting(read_items(data), tokenizer, model.config.n_positions)
    items = random.Random(0).sample(usable, min(count, len(usable)))

    def workload() -> None:
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16"):
            if name in (_STOCK, _OURS_ONE_BY_ONE):
                list(one_item_at_a_time(model, lambda text: tokenizer(text)["input_ids"], items))
            else:
                HellaSwag.prepare(items, "completion", tokenizer).evaluate(accelerator, model)

    return workload


def generation_workload(name: str, source: str, new_tokens: int) -> Workload:
    """Returns a workload that generates `new_tokens` greedily from an empty prompt."""
    make_accelerator()  # the same settings of memory and threads for both
    model, tokenizer = load_model(source)
    start = torch.tensor([[tokenizer.eos_token_id]], device=device())
    if name == _STOCK:
        stock = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32).eval().to(device())
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}

    def workload() -> None:
        if name == _STOCK:
            stock.generate(start, attention_mask=torch.ones_like(start), **options)
        else:
            generate(model, tokenizer, "", Sampling(max_new_tokens=new_tokens, temperature=0))

    return workload


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def table(title: str, results: dict[str, tuple[list[float], int]], amount: int, unit: str) -> str:
    """Returns speeds, and their ratios to the first implementation within rounds."""
    first, _ = next(iter(results.values()))
    lines = [f"| {title} | {unit} a second (spread) | ratio (spread) | peak memory |", "| --- | --- | --- | --- |"]
    for name, (seconds, memory) in results.items():
        speeds = [amount / one for one in seconds]
        ratios = [base / one for base, one in zip(first, seconds, strict=True)]
        lines.append(f"| {name} | {spread(speeds, '.1f')} | {spread(ratios, '.2f')} | {memory / 2**20:,.0f} MiB |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser("python -m benchmarks.evaluation", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("data", type=Path, metavar="FILE", help="hellaswag_val.jsonl; downloaded if not given")
    parser.add_option("items", type=int, default=500, help="random items of HellaSwag")
    parser.add_option("new_tokens", type=int, default=200, help="tokens to generate")
    parser.add_option("repeats", type=int, default=5, help="rounds of measurements")
    parser.add_option("compile", action="store_true", help="measure a compiled model too")
    args = parser.parse_args()
    if min(args.items, args.new_tokens, args.repeats) < 1:
        raise UserError("items, new_tokens and repeats must be at least 1")
    model, tokenizer = load_model(args.model)
    count = min(args.items, len(fitting(read_items(args.data), tokenizer, model.config.n_positions)))
    names = [_STOCK, _OURS_ONE_BY_ONE, _OURS, *([_COMPILED] if args.compile else [])]
    setups: dict[str, Setup]
    for precision in ("float32", "bfloat16"):
        setups = {name: partial(hellaswag_workload, name, args.model, args.data, count, precision) for name in names}
        results = run_interleaved(setups, args.repeats)
        print("\n" + table(f"{count} items of HellaSwag, {precision}", results, count, "items"), flush=True)
    tokens = min(args.new_tokens, model.config.n_positions - 1)
    setups = {name: partial(generation_workload, name, args.model, tokens) for name in (_STOCK, _OURS)}
    results = run_interleaved(setups, args.repeats)
    print("\n" + table(f"generation of {tokens} tokens, float32", results, tokens, "tokens"))


if __name__ == "__main__":
    run(main)

"""How fast HellaSwag and generation are, beside the peer's loop over items and stock `generate()`.

python -m eval.benchmark runs/quickstart/checkpoints/step_00000800 --data hellaswag_val.jsonl

The contenders take turns, on the same weights and items; ratios are medians of those within a round.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from data_prep.cli import ArgumentParser, UserError, run
from eval.generate import Sampling, generate
from eval.hellaswag import HellaSwag, read_items
from eval.launch import make_accelerator
from eval.models import compile_blocks, load_model


@torch.no_grad()
def one_item_at_a_time(
    model: Any, tokenize: Callable[[str], list[int]], items: list[dict[str, Any]]
) -> Iterator[tuple[list[float], list[float]]]:
    """Summed and mean loss of each item's endings, found as in build-nanogpt: four padded rows in a forward pass.

    Args:
        model: stock GPT-2, or any that gives logits.
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
    """The items that the peer's loop can score: it does not cut what is longer than the model's context."""
    task = HellaSwag.prepare(items, "completion", tokenizer)
    return [
        item
        for item, question in zip(items, task.questions, strict=True)
        if len(question.context) + max(map(len, question.endings)) <= context
    ]


def hellaswag_contenders(model: Any, stock: Any, tokenizer: Any, items: list[dict[str, Any]], compiled: Any) -> dict:
    """What scores `items` under the completion rule, tokenization and all."""
    accelerator = make_accelerator()

    def ours(model: Any) -> None:
        HellaSwag.prepare(items, "completion", tokenizer).evaluate(accelerator, model)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    contenders = {
        "one item at a time, stock GPT-2": lambda: list(one_item_at_a_time(stock, tokenize, items)),
        "one item at a time, GPTModel": lambda: list(one_item_at_a_time(model, tokenize, items)),
        "this HellaSwag": lambda: ours(model),
    }
    return contenders | ({"this HellaSwag, compiled": lambda: ours(compiled)} if compiled is not None else {})


def generation_contenders(model: Any, stock: Any, tokenizer: Any, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """What continues the empty document by `new_tokens` of the likeliest tokens."""
    start = torch.tensor([[tokenizer.eos_token_id]], device=model.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    sampling = Sampling(max_new_tokens=new_tokens, temperature=0)
    return {
        "stock generate()": lambda: stock.generate(start, attention_mask=torch.ones_like(start), **options),
        "this generate": lambda: generate(model, tokenizer, "", sampling),
    }


def race(title: str, contenders: dict[str, Callable[[], Any]], amount: int, unit: str, repeats: int) -> None:
    """Time the contenders in turn, and print a table of the speeds and of the ratios to the first one."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()  # what happens once only, as compilation, is not timed
    for _ in range(repeats):
        for name, contender in contenders.items():
            started = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - started)
    first = next(iter(times.values()))
    print(f"\n| {title} | {unit} a second (spread) | ratio (spread) |\n| --- | --- | --- |")
    for name, seconds in times.items():
        speeds = [amount / one for one in seconds]
        ratios = [base / one for base, one in zip(first, seconds, strict=True)]
        print(f"| {name} | {_spread(speeds, '.1f')} | {_spread(ratios, '.2f')} |", flush=True)


def _spread(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    from transformers import GPT2LMHeadModel

    parser = ArgumentParser(prog="python -m eval.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("data", type=Path, metavar="FILE", help="hellaswag_val.jsonl; downloaded if not given")
    parser.add_option("items", type=int, default=500, help="of HellaSwag, drawn at random")
    parser.add_option("new_tokens", type=int, default=200, help="to generate")
    parser.add_option("repeats", type=int, default=5, help="rounds")
    parser.add_option("compile", action="store_true", help="let a compiled model take part")
    args = parser.parse_args()
    if min(args.items, args.new_tokens, args.repeats) < 1:
        raise UserError("items, new_tokens and repeats must be at least 1")
    model, tokenizer = load_model(args.model)
    stock = GPT2LMHeadModel.from_pretrained(args.model, dtype=torch.float32).eval().to(model.device)
    compiled = None
    if args.compile:
        compiled, _ = load_model(args.model)
        compile_blocks(compiled)
    known = fitting(read_items(args.data), tokenizer, model.config.n_positions)
    items = random.Random(0).sample(known, min(args.items, len(known)))
    hellaswag = hellaswag_contenders(model, stock, tokenizer, items, compiled)
    for precision in ("float32", "bfloat16"):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            race(f"{len(items)} items of HellaSwag, {precision}", hellaswag, len(items), "items", args.repeats)
    tokens = min(args.new_tokens, model.config.n_positions - 1)
    contenders = generation_contenders(model, stock, tokenizer, tokens)
    race(f"generation of {tokens} tokens, float32", contenders, tokens, "tokens", args.repeats)


if __name__ == "__main__":
    run(main)

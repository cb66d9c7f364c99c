"""How fast HellaSwag and generation are, beside the peer's loop over items and stock `generate()`.

python -m benchmarks.evaluation runs/quickstart/checkpoints/step_00000800 --data hellaswag_val.jsonl

The contenders take turns, each in a process of its own, on the same weights and items; ratios are medians of those
within a round.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from benchmarks.interleaved import Turn, contest, spread
from data_prep.common.command_line import ArgumentParser, UserError, run
from eval.common.devices import make_accelerator
from eval.common.models import compile_blocks, load_model
from eval.generate import Sampling, generate
from eval.hellaswag import HellaSwag, read_items

_STOCK, _OURS_IN_A_LOOP = "one item at a time, stock GPT-2", "one item at a time, GPTModel"
_OURS, _COMPILED = "this project", "this project, compiled"


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


def hellaswag_turn(name: str, source: str, data: Path | None, count: int, precision: str) -> Turn:
    """What scores `count` items under the completion rule, tokenization and all."""
    if name in (_STOCK, _OURS_IN_A_LOOP):
        model, tokenizer = load_model(source)
        if name == _STOCK:
            model = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32).eval().to(device())
    else:
        accelerator = make_accelerator()
        model, tokenizer = load_model(source)
        if name == _COMPILED:
            compile_blocks(model)
    known = fitting(read_items(data), tokenizer, model.config.n_positions)
    items = random.Random(0).sample(known, min(count, len(known)))

    def turn() -> None:
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bfloat16"):
            if name in (_STOCK, _OURS_IN_A_LOOP):
                list(one_item_at_a_time(model, lambda text: tokenizer(text)["input_ids"], items))
            else:
                HellaSwag.prepare(items, "completion", tokenizer).evaluate(accelerator, model)

    return turn


def generation_turn(name: str, source: str, new_tokens: int) -> Turn:
    """What continues the empty document by `new_tokens` of the likeliest tokens."""
    make_accelerator()  # the memory and the threads of both as this project has them
    model, tokenizer = load_model(source)
    start = torch.tensor([[tokenizer.eos_token_id]], device=device())
    if name == _STOCK:
        stock = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32).eval().to(device())
        options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}

    def turn() -> None:
        if name == _STOCK:
            stock.generate(start, attention_mask=torch.ones_like(start), **options)
        else:
            generate(model, tokenizer, "", Sampling(max_new_tokens=new_tokens, temperature=0))

    return turn


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def table(title: str, results: dict[str, tuple[list[float], int]], amount: int, unit: str) -> str:
    """Speeds, and their ratios to the first contender's within rounds."""
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
    parser.add_option("items", type=int, default=500, help="of HellaSwag, drawn at random")
    parser.add_option("new_tokens", type=int, default=200, help="to generate")
    parser.add_option("repeats", type=int, default=5, help="rounds")
    parser.add_option("compile", action="store_true", help="let a compiled model take part")
    args = parser.parse_args()
    if min(args.items, args.new_tokens, args.repeats) < 1:
        raise UserError("items, new_tokens and repeats must be at least 1")
    model, tokenizer = load_model(args.model)
    count = min(args.items, len(fitting(read_items(args.data), tokenizer, model.config.n_positions)))
    names = [_STOCK, _OURS_IN_A_LOOP, _OURS, *([_COMPILED] if args.compile else [])]
    for precision in ("float32", "bfloat16"):
        contenders = {name: partial(hellaswag_turn, name, args.model, args.data, count, precision) for name in names}
        results = contest(contenders, args.repeats)
        print("\n" + table(f"{count} items of HellaSwag, {precision}", results, count, "items"), flush=True)
    tokens = min(args.new_tokens, model.config.n_positions - 1)
    contenders = {name: partial(generation_turn, name, args.model, tokens) for name in (_STOCK, _OURS)}
    print("\n" + table(f"generation of {tokens} tokens, float32", contest(contenders, args.repeats), tokens, "tokens"))


if __name__ == "__main__":
    run(main)

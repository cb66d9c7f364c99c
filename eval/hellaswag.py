"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830) under the two rules behind published numbers.

    accelerate launch -m eval.hellaswag MODEL [--data FILE] [--limit N]

completion  the context, a space and the ending; acc by the summed loss, acc_norm by the mean loss of a token
            (build-nanogpt, llm.c, and the numbers published for GPT-3)
lm_eval     the activity, the cleaned context and ending; acc by the summed loss, acc_norm by that of a character
            (EleutherAI's harness, the Open LLM Leaderboard)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from data_prep.common.command_line import ArgumentParser, UserError, first_line, run
from data_prep.common.files import read_text, write_text
from data_prep.common.hub import limit_waiting
from data_prep.common.schema import STRICT, parse_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from eval.common.multiple_choice import Question
    from modeling import GPTModel

RULES = ("completion", "lm_eval")
BATCH_SIZE = 16
_DATASET = "Rowan/hellaswag"
_FILE = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"


def _clean(text: str) -> str:
    """Removes the tags of WikiHow's layout, such as `[header]` and `[title]`."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _check_ending(text: str) -> str:
    if not _clean(text):
        raise ValueError("is empty")
    return text


_Text = Annotated[str, Field(min_length=1)]


class Item(TypedDict):
    """A line of `hellaswag_val.jsonl`. `label` is the index of the correct ending (text on the Hub)."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}  # type: ignore[misc]

    activity_label: _Text
    ctx: _Text
    ctx_a: _Text
    ctx_b: str
    endings: Annotated[list[Annotated[str, AfterValidator(_check_ending)]], Field(min_length=2)]
    label: int | str


@dataclass(frozen=True)
class Result:
    """A model's scores under one rule; `nats` is the summed cross entropy of each ending of each item."""

    rule: str
    acc: float
    acc_norm: float
    items: int
    truncated: int  # items whose context was truncated from the left
    nats: list[list[float]]

    def metrics(self) -> dict[str, float]:
        """Returns the scores keyed by `hellaswag/RULE/SCORE`."""
        return {f"hellaswag/{self.rule}/acc": self.acc, f"hellaswag/{self.rule}/acc_norm": self.acc_norm}

    def __str__(self) -> str:
        def with_error(share: float) -> str:
            return f"{share:.4f} ± {math.sqrt(share * (1 - share) / max(self.items - 1, 1)):.4f}"

        cut = f", {self.truncated:,} contexts cut from the left to fit the model's" if self.truncated else ""
        return f"acc_norm {with_error(self.acc_norm)}, acc {with_error(self.acc)} ({self.items:,} items{cut})"


@dataclass(frozen=True)
class HellaSwag:
    """Items tokenized for one rule; acc_norm divides by the endings' `lengths`."""

    rule: str
    questions: list[Question]
    lengths: list[list[int]]
    labels: list[int]

    @classmethod
    def prepare(cls, items: Sequence[Mapping[str, Any]], rule: str, tokenizer: Any) -> HellaSwag:
        """Tokenizes items of `read_items` by `rule`."""
        from data_prep.tokenization.tokenizer import encode
        from eval.common.multiple_choice import Question

        separate = rule == "completion"
        texts = [(item["ctx"], item["endings"]) if separate else _lm_eval_texts(item) for item in items]
        contexts = encode(tokenizer, [context if separate else context.rstrip() for context, _ in texts])
        # The harness tokenizes context and ending together. Spaces at the end of the context belong to the ending.
        prefixed = [f"{'' if separate else context} {ending}" for context, endings in texts for ending in endings]
        tokens = iter(encode(tokenizer, prefixed))
        questions = [
            Question(ids, [next(tokens)[0 if separate else len(ids) :] for _ in endings])
            for ids, (_, endings) in zip(contexts, texts, strict=True)
        ]
        measured = [question.endings for question in questions] if separate else [endings for _, endings in texts]
        lengths = [[len(ending) for ending in endings] for endings in measured]
        return cls(rule, questions, lengths, [int(item["label"]) for item in items])

    def evaluate(
        self,
        accelerator: Accelerator,
        model: GPTModel,
        batch_size: int = BATCH_SIZE,
        before_batch: Callable[[], object] | None = None,
    ) -> Result:
        """Scores a model, as `score` does. Collective; same result on all ranks."""
        from eval.common.multiple_choice import accuracy, count_truncated, score

        nats = score(accelerator, model, self.questions, batch_size, before_batch)
        acc, acc_norm = (accuracy(nats, self.labels, lengths) for lengths in (None, self.lengths))
        truncated = count_truncated(self.questions, model.config.n_positions)
        return Result(self.rule, acc, acc_norm, len(self.questions), truncated, nats)


def _lm_eval_texts(item: Mapping[str, Any]) -> tuple[str, list[str]]:
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return _clean(context), [_clean(ending) for ending in item["endings"]]


def read_items(path: Path | None = None, dataset: str = _DATASET) -> list[Item]:
    """Reads the validation set from a file in the original format, or from the Hub. Raises `UserError` if that fails,
    and for an invalid item, with its line."""
    # Not splitlines, which would split at characters that JSON strings may contain.
    lines = [json.dumps(item) for item in _download(dataset)] if path is None else read_text(path).split("\n")
    where = path or dataset
    items = [_parse_item(line, f"{where}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise UserError(f"{where}: there is nothing in it")
    return items


def _parse_item(line: str, where: str) -> Item:
    item = parse_json(line, Item, where)
    if str(item["label"]) not in map(str, range(len(item["endings"]))):
        raise UserError(f"{where}: label {item['label']!r} is not one of 0 to {len(item['endings']) - 1}")
    return item


def _download(dataset: str) -> list[dict[str, Any]]:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    disable_progress_bars()
    limit_waiting()
    try:
        return load_dataset(dataset, split="validation").to_list()
    except (OSError, ValueError, DatasetsError) as error:
        raise UserError(
            f"cannot download {dataset} ({first_line(error)}); get {_FILE} and give it as --data"
        ) from error


def main() -> None:
    parser = ArgumentParser("accelerate launch -m eval.hellaswag", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("data", type=Path, metavar="FILE", help="hellaswag_val.jsonl; downloaded if not given")
    parser.add_option("limit", type=int, help="only the first N items")
    parser.add_option("rules", nargs="+", choices=RULES, default=list(RULES), help="rules to score by")
    parser.add_option("batch_size", type=int, default=BATCH_SIZE, help="rows in a forward pass of a process")
    parser.add_option("output", type=Path, metavar="FILE", help="write all scores, also of each item, as JSON")
    args = parser.parse_args()
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise UserError(f"batch_size={args.batch_size} and limit={args.limit} must be at least 1")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"output={args.output}: no such folder {args.output.parent}")
    from eval.common.devices import make_accelerator
    from eval.common.models import load_model

    accelerator = make_accelerator()
    with accelerator.main_process_first():
        items = read_items(args.data)[: args.limit]
    model, tokenizer = load_model(args.model, accelerator.device)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    results = []
    for rule in args.rules:
        task = HellaSwag.prepare(items, rule, tokenizer)
        results.append(task.evaluate(accelerator, model, args.batch_size))
        accelerator.print(f"{rule:10}  {results[-1]}")
    if args.output and accelerator.is_main_process:
        write_text(args.output, json.dumps([asdict(one) for one in results]) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)

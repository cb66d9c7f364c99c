"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830) by the two rules that published numbers follow.

    accelerate launch -m eval.hellaswag MODEL [--data FILE] [--limit N]

completion  the context, a space and the ending; acc by the summed loss, acc_norm by the mean loss of a token
            (build-nanogpt, llm.c, and the numbers published for GPT-3)
lm_eval     the activity, the cleaned context and ending; acc by the summed loss, acc_norm by that of a character
            (EleutherAI's harness, the Open LLM Leaderboard)
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from data_prep.common.command_line import ArgumentParser, UserError, first_line, run
from data_prep.common.files import read_text, write_text
from eval.common.devices import make_accelerator
from eval.common.models import compile_blocks, load_model
from eval.scoring.multiple_choice import Question, accuracy, count_truncated, score
from modeling import GPTModel

RULES = ("completion", "lm_eval")
BATCH_SIZE = 16
_DATASET = "Rowan/hellaswag"
_ADDRESS = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
_TEXTS = ("activity_label", "ctx", "ctx_a", "ctx_b")  # of which ctx_b may be empty


@dataclass(frozen=True)
class Result:
    """Scores of a model under one rule.

    Attributes:
        truncated: items whose context was cut from its left to fit the model's.
        nats: the summed cross entropy of each ending of each item.
    """

    rule: str
    acc: float
    acc_norm: float
    items: int
    truncated: int
    nats: list[list[float]]

    def metrics(self) -> dict[str, float]:
        """The scores under names that say which rule they follow."""
        return {f"hellaswag/{self.rule}/acc": self.acc, f"hellaswag/{self.rule}/acc_norm": self.acc_norm}

    def __str__(self) -> str:
        def shown(share: float) -> str:
            return f"{share:.4f} ± {math.sqrt(share * (1 - share) / max(self.items - 1, 1)):.4f}"

        cut = f", {self.truncated:,} contexts cut from the left to fit the model's" if self.truncated else ""
        return f"acc_norm {shown(self.acc_norm)}, acc {shown(self.acc)} ({self.items:,} items{cut})"


@dataclass(frozen=True)
class HellaSwag:
    """The items under one rule, tokenized; `lengths` of the endings are what acc_norm divides by."""

    rule: str
    questions: list[Question]
    lengths: list[list[int]]
    labels: list[int]

    @classmethod
    def prepare(cls, items: Sequence[dict[str, Any]], rule: str, tokenizer: Any) -> "HellaSwag":
        """Tokenize `items`, as `read_items` gives them, by `rule`."""
        render = _render_completion if rule == "completion" else _render_lm_eval
        texts = [render(item) for item in items]
        contexts = _tokenize(tokenizer, [context.rstrip() if rule == "lm_eval" else context for context, _ in texts])
        if rule == "completion":
            endings = iter(_tokenize(tokenizer, [f" {ending}" for _, choices in texts for ending in choices]))
            questions = [Question(ids, [next(endings) for _ in texts[n][1]]) for n, ids in enumerate(contexts)]
            lengths = [[len(ending) for ending in question.endings] for question in questions]
        else:
            # The harness tokenizes context and ending together, and takes what is beyond the context's own length; to
            # the ending belong the spaces before it.
            whole = iter(_tokenize(tokenizer, [f"{text} {ending}" for text, choices in texts for ending in choices]))
            questions = [
                Question(ids, [next(whole)[len(ids) :] for _ in texts[n][1]]) for n, ids in enumerate(contexts)
            ]
            lengths = [[len(ending) for ending in choices] for _, choices in texts]
        return cls(rule, questions, lengths, [int(item["label"]) for item in items])

    def evaluate(self, accelerator: Accelerator, model: GPTModel, batch_size: int = BATCH_SIZE) -> Result:
        """Score a model; called by all processes together, with the same result on each."""
        nats = score(accelerator, model, self.questions, batch_size)
        return Result(
            rule=self.rule,
            acc=accuracy(nats, self.labels, None),
            acc_norm=accuracy(nats, self.labels, self.lengths),
            items=len(self.questions),
            truncated=count_truncated(self.questions, model.config.n_positions),
            nats=nats,
        )


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]


def _render_completion(item: dict[str, Any]) -> tuple[str, list[str]]:
    return item["ctx"], item["endings"]


def _render_lm_eval(item: dict[str, Any]) -> tuple[str, list[str]]:
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return _clean(context), [_clean(ending) for ending in item["endings"]]


def _clean(text: str) -> str:
    """Without the marks of WikiHow's layout, as `[header]` and `[title]`, which are no part of the text."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def read_items(path: Path | None = None, dataset: str = _DATASET, address: str = _ADDRESS) -> list[dict[str, Any]]:
    """The items of the validation set: of a file in the original's format, else from the Hub, else from its address.

    Raises:
        UserError: for a file that cannot be read or an item with missing fields or a label out of range, with the
            number of its line; and where there is neither a file nor a network.
    """
    if path is None:
        records, where = _download(dataset, address), dataset
    else:
        records, where = _read_lines(path), str(path)
    for number, record in enumerate(records, start=1):
        if record is not None:
            _check(record, f"{where}, line {number}")
    if not (items := [record for record in records if record is not None]):
        raise UserError(f"{where}: there is nothing in it")
    return items


def _read_lines(path: Path) -> list[Any]:
    """The value of each line, None for an empty one."""
    records = []
    # Not splitlines: it would also split at separators that JSON leaves unescaped within strings.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            records.append(json.loads(line) if line.strip() else None)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
    return records


def _check(item: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(item).__name__}")
    missing = [name for name in _TEXTS if not isinstance(item.get(name), str) or not (item[name] or name == "ctx_b")]
    endings = item.get("endings")
    if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and _clean(e) for e in endings):
        missing.append("endings")
    if missing:
        raise UserError(f"{where}: no usable {', '.join(missing)} among the fields {', '.join(item)}")
    if str(item.get("label")) not in map(str, range(len(endings))):
        raise UserError(f"{where}: label {item.get('label')!r} is not one of 0 to {len(endings) - 1}")


def _download(dataset: str, address: str) -> list[dict[str, Any]]:
    try:
        from datasets import disable_progress_bars, load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError("HellaSwag: to download it, pip install datasets; or name a file that you have") from error

    disable_progress_bars()
    try:
        return load_dataset(dataset, split="validation").to_list()
    except (OSError, ValueError, DatasetsError) as from_hub:
        try:
            return load_dataset("json", data_files=address, split="train").to_list()
        except (OSError, ValueError, DatasetsError) as error:
            raise UserError(
                f"HellaSwag: neither the data set {dataset} ({first_line(from_hub)}) nor {address} "
                f"({first_line(error)}) can be had; name a file that you have"
            ) from error


def main() -> None:
    parser = ArgumentParser("accelerate launch -m eval.hellaswag", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("data", type=Path, metavar="FILE", help="hellaswag_val.jsonl; downloaded if not given")
    parser.add_option("limit", type=int, help="only the first so many items")
    parser.add_option("rules", nargs="+", choices=RULES, default=list(RULES), help="which rules to score by")
    parser.add_option("batch_size", type=int, default=BATCH_SIZE, help="rows in a forward pass of one process")
    parser.add_option("compile", action="store_true", help="compile the model's blocks first")
    parser.add_option("output", type=Path, metavar="FILE", help="write scores, and those of each item, there as JSON")
    args = parser.parse_args()
    if args.batch_size < 1 or (args.limit is not None and args.limit < 1):
        raise UserError(f"batch_size={args.batch_size} and limit={args.limit} must be at least 1")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"output={args.output}: no such folder {args.output.parent}")
    accelerator = make_accelerator()
    with accelerator.main_process_first():
        items = read_items(args.data)[: args.limit]
    model, tokenizer = load_model(args.model, accelerator.device)
    if args.compile:
        compile_blocks(model)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    results = []
    for rule in args.rules:
        results.append(HellaSwag.prepare(items, rule, tokenizer).evaluate(accelerator, model, args.batch_size))
        accelerator.print(f"{rule:10}  {results[-1]}")
    if args.output and accelerator.is_main_process:
        write_text(args.output, json.dumps([asdict(one) for one in results]) + "\n")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)

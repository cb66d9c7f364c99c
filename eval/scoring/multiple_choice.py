"""How likely a model finds each of several endings of a text.

The context of a question is computed once for all of its endings. A question is laid out in a row as a tree, a stem and
its branches, in which a token attends to its own branch and to the stem:

    row        c0 c1 c2 | c3 a0 a1 | c3 b0 b1 b2 | c3 ...
    position    0  1  2    3  4  5    3  4  5  6    3
    label       -  -  -   a0 a1 a2   b0 b1 b2 b3
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.common.command_line import UserError
from eval.common.models import evaluating, is_compiled
from modeling import GPTModel
from modeling.loss import IGNORE_INDEX

# Width of the rows of a compiled model, which are all of one shape: wide enough that few have room left over.
_ROW_TOKENS = 512


@dataclass(frozen=True)
class Question:
    """Token ids of a context, at least one, and of the endings to choose from."""

    context: list[int]
    endings: list[list[int]]


@dataclass(frozen=True)
class _Tree:
    """Some endings of a question behind their context: `branches` are (slot, input ids, labels)."""

    stem: list[int]
    branches: list[tuple[int, list[int], list[int]]]

    def __len__(self) -> int:
        return len(self.stem) + sum(len(labels) for _, _, labels in self.branches)


def accuracy(nats: Sequence[Sequence[float]], labels: Sequence[int], lengths: Sequence[Sequence[int]] | None) -> float:
    """The share of questions whose label is the ending of the lowest `nats` (summed cross entropy), divided by
    `lengths` where given; of equal ones the first is chosen."""
    correct = 0
    for number, (costs, label) in enumerate(zip(nats, labels, strict=True)):
        if lengths is not None:
            costs = [cost / length for cost, length in zip(costs, lengths[number], strict=True)]
        correct += costs.index(min(costs)) == label
    return correct / len(labels)


def count_truncated(questions: Sequence[Question], n_positions: int) -> int:
    """How many questions have a context too long for the model, which sees the end of it."""
    return sum(len(question.context) + max(map(len, question.endings)) > n_positions + 1 for question in questions)


def score(
    accelerator: Accelerator, model: GPTModel, questions: Sequence[Question], batch_size: int
) -> list[list[float]]:
    """The summed cross entropy of each ending of each question, in nats; the same on every process.

    A context is cut from its left where it does not fit with an ending, as in EleutherAI's harness. The processes take
    turns at the batches, and every one does the same number of them.

    Args:
        model: without wrappers of distribution.
        batch_size: rows in a forward pass; a row is a question, or several in a compiled model.

    Raises:
        UserError: for an ending longer than the model's context.
    """
    slots = sum(len(question.endings) for question in questions)
    nats = torch.zeros(slots, dtype=torch.float32 if accelerator.device.type == "mps" else torch.float64)
    width = min(_ROW_TOKENS, model.config.n_positions) if is_compiled(model) else None
    rows = _pack(_trees(questions, model.config.n_positions, width or model.config.n_positions), width)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with evaluating(model, "sdpa"):  # the one kernel that takes any mask on any device
        for turn in range(0, len(batches), accelerator.num_processes):
            mine = turn + accelerator.process_index
            batch = batches[mine] if mine < len(batches) else [[]]
            batch = batch + [[]] * (batch_size - len(batch) if width else 0)
            tensors = {name: tensor.to(accelerator.device) for name, tensor in _lay_out(batch, width).items()}
            loss = model(
                input_ids=tensors["input_ids"],
                position_ids=tensors["position_ids"],
                attention_mask=_tree_mask(tensors["tree"], tensors["branch"]),
                shift_labels=tensors["labels"],
                loss_reduction="none",
                use_cache=False,
                skip_logits=True,
            ).loss
            nats.index_add_(0, tensors["slot"].flatten().cpu(), loss.flatten().cpu().to(nats.dtype))
    summed = iter(accelerator.reduce(nats.to(accelerator.device)).tolist())
    return [[next(summed) for _ in question.endings] for question in questions]


def _trees(questions: Sequence[Question], n_positions: int, room: int) -> Iterator[_Tree]:
    """Each question as one tree; as several where endings leave different contexts, or exceed the `room` of a row."""
    slot = 0
    for question in questions:
        trees: dict[int, _Tree] = {}
        for ending in question.endings:
            if len(ending) > n_positions:
                raise UserError(
                    f"an ending of {len(ending)} tokens exceeds the model's context of {n_positions}; evaluate a model "
                    f"with a longer one"
                )
            context = question.context[-(n_positions + 1 - len(ending)) :]
            tree = trees.get(len(context))
            if tree is None or len(tree) + len(ending) > room:
                if tree is not None:
                    yield tree
                tree = trees[len(context)] = _Tree(context[:-1], [])
            tree.branches.append((slot, [context[-1], *ending[:-1]], ending))
            slot += 1
        yield from trees.values()


def _pack(trees: Iterator[_Tree], width: int | None) -> list[list[_Tree]]:
    """Trees in rows, the longest first; with a `width` as many in a row as fit, each where it leaves the least room."""
    rows: list[list[_Tree]] = []
    room: list[tuple[int, int]] = []  # what is left of a row, and its number
    for tree in sorted(trees, key=len, reverse=True):
        place = bisect_left(room, (len(tree), 0))
        if place < len(room):
            left, number = room.pop(place)
        else:
            left, number = max(width or 0, len(tree)), len(rows)
            rows.append([])
        rows[number].append(tree)
        if width:
            insort(room, (left - len(tree), number))
    return rows


def _lay_out(rows: list[list[_Tree]], width: int | None) -> dict[str, Tensor]:
    """Tensors `[B, T]` of a batch: what the model takes, and each token's tree, branch (0 for the stem) and slot."""
    padding = {"input_ids": 0, "position_ids": 0, "labels": IGNORE_INDEX, "tree": -1, "branch": 0, "slot": 0}
    length = max([width or 1, *(sum(map(len, row)) for row in rows)])
    columns: dict[str, list[list[int]]] = {name: [] for name in padding}
    for row in rows:
        cells: dict[str, list[int]] = {name: [] for name in padding}
        for number, tree in enumerate(row):
            stem = len(tree.stem)
            parts = [(0, tree.stem, [IGNORE_INDEX] * stem), *tree.branches]
            for branch, (slot, ids, labels) in enumerate(parts):
                start = stem if branch else 0
                cells["input_ids"] += ids
                cells["position_ids"] += range(start, start + len(ids))
                cells["labels"] += labels
                cells["tree"] += [number] * len(ids)
                cells["branch"] += [branch] * len(ids)
                cells["slot"] += [slot] * len(ids)
        for name, values in cells.items():
            columns[name].append(values + [padding[name]] * (length - len(values)))
    return {name: torch.tensor(values) for name, values in columns.items()}


def _tree_mask(tree: Tensor, branch: Tensor) -> Tensor:
    """Who attends to whom, `[B, 1, T, T]` of bool: a token to those before it in its own branch and in the stem."""
    places = torch.arange(tree.shape[1], device=tree.device)
    before = places[:, None] >= places
    same_tree = tree[:, :, None] == tree[:, None, :]
    same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (before & same_tree & same_branch)[:, None]

"""Likelihood of each of several endings of a text.

The context of a question is computed once for all of its endings. A question is a tree in a row: a stem and branches. A
token attends to its own branch and to the stem:

    row        c0 c1 c2 | c3 a0 a1 | c3 b0 b1 b2 | c3 ...
    position    0  1  2    3  4  5    3  4  5  6    3
    label       -  -  -   a0 a1 a2   b0 b1 b2 b3
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.common.command_line import UserError
from eval.common.models import evaluating, is_compiled
from modeling import GPTModel
from modeling.loss import IGNORE_INDEX

_ROW_TOKENS = (
    512  # in each row of a compiled model, which has one shape; long enough to be filled well by several trees
)


@dataclass(frozen=True)
class Question:
    """Token ids of a context, at least one, and of the endings to choose from."""

    context: list[int]
    endings: list[list[int]]


@dataclass(frozen=True)
class _Tree:
    """Endings of a question after their context. `branches` are (index of the ending, input ids, labels)."""

    stem: list[int]
    branches: list[tuple[int, list[int], list[int]]]

    def __len__(self) -> int:
        return len(self.stem) + sum(len(labels) for _, _, labels in self.branches)


def accuracy(nats: Sequence[Sequence[float]], labels: Sequence[int], lengths: Sequence[Sequence[int]] | None) -> float:
    """Returns the share of questions whose label is the index of the lowest `nats` (summed cross entropy), divided by
    `lengths` if given; the first of equal ones."""
    if lengths is not None:
        nats = [[cost / n for cost, n in zip(*pair, strict=True)] for pair in zip(nats, lengths, strict=True)]
    correct = [costs.index(min(costs)) == label for costs, label in zip(nats, labels, strict=True)]
    return sum(correct) / len(correct)


def count_truncated(questions: Sequence[Question], n_positions: int) -> int:
    """Returns the number of questions whose context is too long for the model."""
    return sum(len(question.context) + max(map(len, question.endings)) > n_positions + 1 for question in questions)


def score(
    accelerator: Accelerator,
    model: GPTModel,
    questions: Sequence[Question],
    batch_size: int,
    before_batch: Callable[[], object] | None = None,
) -> list[list[float]]:
    """Returns the summed cross entropy in nats of each ending of each question. Collective, the same on all ranks.

    Batches are distributed over the ranks, and all ranks run the same number of them. A context that does not fit
    with an ending is truncated from the left, as in EleutherAI's harness. Raises `UserError` for an ending longer than
    the model's context.

    Args:
        model: without DDP or other wrappers.
        batch_size: rows in a forward pass; a row has one question, in a compiled model several.
        before_batch: called before each batch, equally often on all ranks.
    """
    device, n_positions = accelerator.device, model.config.n_positions
    endings = sum(len(question.endings) for question in questions)
    nats = torch.zeros(endings, dtype=torch.float32 if device.type == "mps" else torch.float64)
    width = min(_ROW_TOKENS, n_positions) if is_compiled(model) else None
    rows = _pack(_trees(questions, n_positions, width or n_positions), width)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with evaluating(model, "sdpa"):  # the only kernel with arbitrary masks on all devices
        for first in range(0, len(batches), accelerator.num_processes):
            if before_batch is not None:
                before_batch()
            own = first + accelerator.process_index
            batch = batches[own] if own < len(batches) else [[]]
            batch = batch + [[]] * (batch_size - len(batch) if width else 0)
            tensors = {name: tensor.to(device) for name, tensor in _to_tensors(batch, width).items()}
            loss = model(
                input_ids=tensors["input_ids"],
                position_ids=tensors["position_ids"],
                attention_mask=_tree_mask(tensors["tree"], tensors["branch"]),
                shift_labels=tensors["labels"],
                loss_reduction="none",
                use_cache=False,
                skip_logits=True,
            ).loss
            nats.index_add_(0, tensors["ending"].flatten().cpu(), loss.flatten().cpu().to(nats.dtype))
    summed = iter(accelerator.reduce(nats.to(device)).tolist())
    return [[next(summed) for _ in question.endings] for question in questions]


def _trees(questions: Sequence[Question], n_positions: int, width: int) -> Iterator[_Tree]:
    """Yields a tree for each question, or several if endings need different contexts or exceed the `width` of a row."""
    index = 0
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
            if tree is None or len(tree) + len(ending) > width:
                if tree is not None:
                    yield tree
                tree = trees[len(context)] = _Tree(context[:-1], [])
            tree.branches.append((index, [context[-1], *ending[:-1]], ending))
            index += 1
        yield from trees.values()


def _pack(trees: Iterator[_Tree], width: int | None) -> list[list[_Tree]]:
    """Returns rows of trees, the longest first: one tree per row, or with a `width` as many as fit (best fit)."""
    rows: list[list[_Tree]] = []
    free: list[tuple[int, int]] = []  # (free tokens, index of the row), sorted
    for tree in sorted(trees, key=len, reverse=True):
        best = bisect_left(free, (len(tree), 0))
        if best < len(free):
            left, row = free.pop(best)
        else:
            left, row = max(width or 0, len(tree)), len(rows)
            rows.append([])
        rows[row].append(tree)
        if width:
            insort(free, (left - len(tree), row))
    return rows


def _to_tensors(rows: list[list[_Tree]], width: int | None) -> dict[str, Tensor]:
    """Returns tensors `[B, T]`: inputs of the model, and the tree, branch (0: stem) and ending of each token."""
    padding = {"input_ids": 0, "position_ids": 0, "labels": IGNORE_INDEX, "tree": -1, "branch": 0, "ending": 0}
    length = max([width or 1, *(sum(map(len, row)) for row in rows)])
    batch = []
    for row in rows:
        tokens: list[tuple[int, ...]] = []
        for number, tree in enumerate(row):
            tokens += [(token, n, IGNORE_INDEX, number, 0, 0) for n, token in enumerate(tree.stem)]
            for branch, (ending, ids, labels) in enumerate(tree.branches, start=1):
                pairs = enumerate(zip(ids, labels, strict=True), start=len(tree.stem))
                tokens += [(token, n, label, number, branch, ending) for n, (token, label) in pairs]
        batch.append(tokens + [tuple(padding.values())] * (length - len(tokens)))
    return dict(zip(padding, torch.tensor(batch).permute(2, 0, 1).contiguous(), strict=True))


def _tree_mask(tree: Tensor, branch: Tensor) -> Tensor:
    """Returns the boolean attention mask `[B, 1, T, T]`: a token sees earlier tokens of its branch and of its stem."""
    indices = torch.arange(tree.shape[1], device=tree.device)
    earlier = indices[:, None] >= indices
    same_tree = tree[:, :, None] == tree[:, None, :]
    same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (earlier & same_tree & same_branch)[:, None]

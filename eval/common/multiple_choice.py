"""Multiple choice: likelihood of each possible ending of a text.

The context of a question is computed once for all of its endings. A question is a tree in a row: a stem and branches. A
token attends to its own branch and to the stem:

    row        c0 c1 c2 | c3 a0 a1 | c3 b0 b1 b2 | c3 ...
    position    0  1  2    3  4  5    3  4  5  6    3
    label       -  -  -   a0 a1 a2   b0 b1 b2 b3
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from data_prep.common.command_line import UserError
from eval.common.models import evaluating
from modeling import GPTModel
from modeling.loss import IGNORE_INDEX


@dataclass(frozen=True)
class Question:
    """Token ids of a context (at least one) and of the endings to choose from."""

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
    """Returns the share of questions whose label has the lowest `nats` (summed cross entropy), divided by `lengths` if
    given; ties go to the first."""
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
    """Returns the summed cross entropy in nats of each ending of each question. Collective; same result on all ranks.

    Batches are distributed over the ranks, and all ranks run the same number of them. A context that does not fit
    with an ending is truncated from the left, as in EleutherAI's harness. Raises `UserError` for an ending longer than
    the model's context.

    Args:
        model: without DDP or other wrappers. Compiled blocks run uncompiled: rows have many shapes.
        batch_size: rows in a forward pass; a row has one question.
        before_batch: called before each batch, equally often on all ranks.
    """
    device = accelerator.device
    endings = sum(len(question.endings) for question in questions)
    nats = torch.zeros(endings, dtype=torch.float32 if device.type == "mps" else torch.float64)
    rows = sorted(_trees(questions, model.config.n_positions), key=len, reverse=True)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    # SDPA is the only kernel with arbitrary masks on all devices.
    with evaluating(model, "sdpa"), torch.compiler.set_stance("force_eager"):
        for first in range(0, len(batches), accelerator.num_processes):
            if before_batch is not None:
                before_batch()
            own = first + accelerator.process_index
            tensors = _to_tensors(batches[own] if own < len(batches) else [_Tree([], [])])
            ids, positions, labels, branch, ending = (tensor.to(device) for tensor in tensors)
            loss = model.token_losses(labels, input_ids=ids, position_ids=positions, attention_mask=_tree_mask(branch))
            nats.index_add_(0, ending.flatten().cpu(), loss.flatten().cpu().to(nats.dtype))
    summed = iter(accelerator.reduce(nats.to(device)).tolist())
    return [[next(summed) for _ in question.endings] for question in questions]


def _trees(questions: Sequence[Question], n_positions: int) -> Iterator[_Tree]:
    """Yields a tree for each question, or several if endings need different contexts or exceed a row of `n_positions`
    tokens."""
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
            if tree is None or len(tree) + len(ending) > n_positions:
                if tree is not None:
                    yield tree
                tree = trees[len(context)] = _Tree(context[:-1], [])
            tree.branches.append((index, [context[-1], *ending[:-1]], ending))
            index += 1
        yield from trees.values()


def _to_tensors(trees: list[_Tree]) -> Sequence[Tensor]:
    """Returns tensors `[B, T]`: input ids, positions, labels, and the branch (0: stem) and ending of each token."""
    length = max(1, *map(len, trees))
    batch = []
    for tree in trees:
        tokens = [(token, n, IGNORE_INDEX, 0, 0) for n, token in enumerate(tree.stem)]
        for branch, (ending, ids, labels) in enumerate(tree.branches, start=1):
            pairs = enumerate(zip(ids, labels, strict=True), start=len(tree.stem))
            tokens += [(token, n, label, branch, ending) for n, (token, label) in pairs]
        batch.append(tokens + [(0, 0, IGNORE_INDEX, 0, 0)] * (length - len(tokens)))
    return torch.tensor(batch).permute(2, 0, 1).contiguous().unbind()


def _tree_mask(branch: Tensor) -> Tensor:
    """Returns the boolean attention mask `[B, 1, T, T]`: a token sees earlier tokens of its branch and of its stem."""
    indices = torch.arange(branch.shape[1], device=branch.device)
    earlier = indices[:, None] >= indices
    same_branch = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (earlier & same_branch)[:, None]

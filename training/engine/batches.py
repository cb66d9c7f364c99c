"""Batches of training data, by the position of their sequences; prefetched by a thread."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data_prep.common.command_line import UserError
from data_prep.sharding.order import Mixture
from modeling.loss import IGNORE_INDEX

Batch = dict[str, Tensor]


class DataError(UserError):
    """Data that cannot be read any more, or that differ from their manifest."""


class Batches:
    """Inputs of the model, by the position of their sequences.

    Args:
        document_start: the id at the start of each document, to keep attention and positions within documents; None
            for attention over the whole sequence, as in GPT-2 and GPT-3.
    """

    def __init__(self, mixture: Mixture, document_start: int | None = None) -> None:
        self.mixture = mixture
        self.document_start = document_start

    def sequences(self, position: int, count: int) -> Batch:
        """`input_ids`, `shift_labels` and, with `document_start`, `position_ids`, `[count, T]` int64 each.

        Raises:
            DataError: if they cannot be read.
        """
        try:
            rows = [self.mixture.read(p) for p in range(position, position + count)]
        except (OSError, UserError) as error:
            raise DataError(str(error)) from error
        tokens = torch.from_numpy(np.stack(rows))
        batch = {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].clone()}
        if self.document_start is not None:
            batch["position_ids"] = _positions_in_documents(batch["input_ids"], self.document_start)
        return batch

    def micro_batches(
        self, position: int, micro_batch: int, accumulation_steps: int, rank: int, num_processes: int
    ) -> list[Batch]:
        """This rank's part of the global batch at `position`."""
        return [
            self.sequences(position + (step * num_processes + rank) * micro_batch, micro_batch)
            for step in range(accumulation_steps)
        ]

    def for_rank(self, count: int, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """This rank's part of the first `count` sequences, in batches of `batch_size`.

        All ranks get the same number of batches of the same size, some with all labels ignored: all ranks of a sharded
        model take part in each forward pass, and a compiled model should see one shape.
        """
        starts = list(range(0, count, batch_size))
        for turn in range(0, len(starts), num_processes):
            mine = turn + rank
            start = starts[mine] if mine < len(starts) else 0
            batch = self.sequences(start, batch_size)
            counted = min(batch_size, count - start) if mine < len(starts) else 0
            batch["shift_labels"][counted:] = IGNORE_INDEX
            yield batch


def _positions_in_documents(input_ids: Tensor, document_start: int) -> Tensor:
    """Positions `[B, T]` that restart at 0 with each document, and at 0 for a document that began earlier."""
    indices = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return indices - torch.where(input_ids == document_start, indices, 0).cummax(dim=1).values


class Prefetcher:
    """Prefetches the next global batch in a thread, while the step works on this one.

    Args:
        make: returns this rank's micro-batches at a position.
        device: of the step. For CUDA the batches are in pinned memory, for copies that the host does not wait for.
    """

    def __init__(self, make: Callable[[int], list[Batch]], device: torch.device) -> None:
        self.make, self.pin = make, device.type == "cuda"
        initializer = None
        if self.pin:
            # Pinning needs a CUDA context, which must be on this rank's device. With one process, Accelerate's device
            # has no index, and torch needs one here.
            index = torch.cuda.current_device() if device.index is None else device.index
            initializer = partial(torch.cuda.set_device, index)
        self.thread = ThreadPoolExecutor(1, initializer=initializer)
        self.made: dict[int, Future[list[Batch]]] = {}

    def take(self, position: int, following: int) -> list[Batch]:
        """The micro-batches at `position`; starts to make those at `following`."""
        now = self.made.pop(position, None) or self.thread.submit(self._pinned, position)
        self.made = {following: self.thread.submit(self._pinned, following)}
        return now.result()

    def close(self) -> None:
        """Ends the thread."""
        self.thread.shutdown(cancel_futures=True)

    def _pinned(self, position: int) -> list[Batch]:
        batches = self.make(position)
        return [{k: v.pin_memory() for k, v in batch.items()} for batch in batches] if self.pin else batches


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; the host does not wait for copies from pinned memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

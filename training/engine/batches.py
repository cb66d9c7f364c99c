"""Batches of the training data: made of sequences by position, ahead of the step that needs them."""

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
    """Data that could be read before cannot be read any more, or are not what their manifest says."""


class Batches:
    """What the model is called with, by the position of its sequences.

    Args:
        document_start: the id that documents begin with, to keep attention and positions within them; None to let them
            reach over the whole sequence, as in GPT-2 and GPT-3.
    """

    def __init__(self, mixture: Mixture, document_start: int | None = None) -> None:
        self.mixture = mixture
        self.document_start = document_start

    def sequences(self, position: int, count: int) -> Batch:
        """`input_ids`, `shift_labels` and, within documents, `position_ids`, `[count, T]` int64 each.

        Raises:
            DataError: where they cannot be read.
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
        """This rank's share of the global batch that begins at `position`."""
        return [
            self.sequences(position + (step * num_processes + rank) * micro_batch, micro_batch)
            for step in range(accumulation_steps)
        ]

    def shared_out(self, count: int, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """This rank's share of the first `count` sequences, in batches of `batch_size`.

        Every rank gets as many batches as the others, all of one size, some with all labels ignored: a sharded model
        takes part in each forward pass of each rank, and a compiled one should see one shape.
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
    """Positions `[B, T]` that begin at 0 with each document; the rest of one that began before does at 0 too."""
    places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
    return places - torch.where(input_ids == document_start, places, 0).cummax(dim=1).values


class Prefetcher:
    """Global batches by position, the next one made by a thread while the step works on this one.

    Args:
        make: gives this rank's micro-batches from a position on.
        device: that they are for. For CUDA they lie in pinned memory, which is copied from without waiting.
    """

    def __init__(self, make: Callable[[int], list[Batch]], device: torch.device) -> None:
        self.make, self.pin = make, device.type == "cuda"
        initializer = None
        if self.pin:
            # Pinning needs a CUDA context, which should not be a second one on another process's device. Accelerate
            # gives a process that is alone a device without an index, which torch does not take here.
            index = torch.cuda.current_device() if device.index is None else device.index
            initializer = partial(torch.cuda.set_device, index)
        self.thread = ThreadPoolExecutor(1, initializer=initializer)
        self.made: dict[int, Future[list[Batch]]] = {}

    def take(self, position: int, following: int) -> list[Batch]:
        """The micro-batches from `position` on; those from `following` on are begun."""
        now = self.made.pop(position, None) or self.thread.submit(self._pinned, position)
        self.made = {following: self.thread.submit(self._pinned, following)}
        return now.result()

    def close(self) -> None:
        """End the thread."""
        self.thread.shutdown(cancel_futures=True)

    def _pinned(self, position: int) -> list[Batch]:
        batches = self.make(position)
        return [{k: v.pin_memory() for k, v in batch.items()} for batch in batches] if self.pin else batches


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied while the host goes on where it can be."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

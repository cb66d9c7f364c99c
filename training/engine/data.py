"""Data of a run: its folders, checked; batches by position; prefetching."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.common.command_line import UserError
from data_prep.common.hub import local_folder
from data_prep.prepare import Recipe, prepare
from data_prep.sharding.manifest import FILE_NAME, Manifest
from data_prep.sharding.order import Mixture, shares_of, training_order
from data_prep.sources.source import BUILTIN, Source
from data_prep.tokenization.byte_level import bytes_of_tokens
from data_prep.tokenization.tokenizer import TokenizerRecord
from modeling.loss import IGNORE_INDEX
from training.settings.schema import QUICKSTART_DATA, TrainingConfig

Batch = dict[str, Tensor]


class DataError(UserError):
    """Data that can no longer be read, or no longer match their manifest."""


class Batches:
    """Model inputs by sequence position.

    Args:
        document_start: id at the start of each document, to keep attention and positions within documents; None for
            attention over the whole sequence, as in GPT-2 and GPT-3.
    """

    def __init__(self, mixture: Mixture, document_start: int | None = None) -> None:
        self.mixture = mixture
        self.document_start = document_start

    def sequences(self, position: int, count: int) -> Batch:
        """`input_ids`, `shift_labels` and, with `document_start`, `position_ids`, `[count, T]` int64 each. Raises
        `DataError` if they cannot be read."""
        try:
            rows = [self.mixture.read(p) for p in range(position, position + count)]
        except (OSError, UserError) as error:
            raise DataError(str(error)) from error
        tokens = torch.from_numpy(np.stack(rows))
        batch = {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": tokens[:, 1:].clone()}
        if self.document_start is not None:
            # They restart at 0 with each document, and at 0 for a document that began earlier.
            indices = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
            starts = torch.where(batch["input_ids"] == self.document_start, indices, 0)
            batch["position_ids"] = indices - starts.cummax(dim=1).values
        return batch

    def micro_batches(
        self, position: int, following: int, micro_batch: int, rank: int, num_processes: int
    ) -> list[Batch]:
        """This rank's part of the global batch from `position` to before `following`."""
        starts = range(position + rank * micro_batch, following, num_processes * micro_batch)
        return [self.sequences(start, micro_batch) for start in starts]

    def for_rank(self, count: int, batch_size: int, rank: int, num_processes: int) -> Iterator[Batch]:
        """This rank's share of the first `count` sequences, in batches of `batch_size`.

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


class Prefetcher:
    """Prefetches the next global batch in a thread during the current step.

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
        self.waited = 0.0  # seconds that the last `take` waited

    def take(self, position: int, following: int) -> list[Batch]:
        """The micro-batches at `position`; starts to make those at `following`."""
        started = time.perf_counter()
        now = self.made.pop(position, None) or self.thread.submit(self._pinned, position)
        self.made = {following: self.thread.submit(self._pinned, following)}
        batches = now.result()
        self.waited = time.perf_counter() - started
        return batches

    def close(self) -> None:
        """Ends the thread."""
        self.thread.shutdown(cancel_futures=True)

    def _pinned(self, position: int) -> list[Batch]:
        batches = self.make(position)
        return [{k: v.pin_memory() for k, v in batch.items()} for batch in batches] if self.pin else batches


@dataclass(frozen=True)
class Data:
    """Data folders with the same tokenizer.

    Attributes:
        names: as in the settings.
        folders: on this machine.
        shares: of each folder in the training tokens; their sum is 1.
    """

    names: list[str]
    folders: list[Path]
    manifests: list[Manifest]
    shares: list[float]

    @property
    def tokenizer(self) -> TokenizerRecord:
        """The tokenizer in the manifests, the same in all of them."""
        return self.manifests[0].tokenizer

    @property
    def tokenizer_folder(self) -> Path:
        return self.folders[0] / "tokenizer"

    def tokens(self, split: str) -> int:
        """The number of tokens in `train` or `val`, over all folders."""
        return sum(manifest.tokens(split) for manifest in self.manifests)

    def identity(self, config: TrainingConfig) -> dict[str, Any]:
        """Everything that determines the order of training data."""
        return {
            "tokenizer": self.tokenizer.sha256,
            "shards": [[shard.sha256 for shard in manifest.shards] for manifest in self.manifests],
            "shares": self.shares,
            "order": config.data.order,
            "document_mask": config.data.document_mask,
            "seed": config.run.seed,
            "sequence_length": config.sequence_length,
        }

    def batches(self, config: TrainingConfig, split: str) -> Batches:
        """The batches of a split; those of validation always in the same order."""
        order = config.data.order if split == "train" else "sequential"
        mixture = training_order(
            self.folders, self.manifests, self.shares, split, order, config.run.seed, config.sequence_length
        )
        document_start = self.tokenizer.eos_token_id if config.data.document_mask else None
        return Batches(mixture, document_start)

    def val_text_bytes(self, batches: Batches, sequences: int, tokenizer: Any) -> int | None:
        """Bytes of text behind the labels of the first `sequences` of validation; None if neither tokens nor manifests
        tell."""
        if (sizes := bytes_of_tokens(tokenizer)) is not None:
            return int(sizes[batches.sequences(0, sequences)["shift_labels"].numpy()].sum())
        mixture = batches.mixture
        counts = zip(self.manifests, mixture.sources, mixture.consumed(sequences), strict=True)
        found = [manifest.val_text_bytes_before(count * source.length + 1) for manifest, source, count in counts]
        known = [size for size in found if size is not None]
        return sum(known) if len(known) == len(found) else None

    def consumed(self, batches: Batches, position: int) -> dict[str, dict[str, float]]:
        """How much of each folder has been read at a position: its `share`, `tokens` and `epochs`."""
        mixture = batches.mixture
        return {
            name: {"share": share, "tokens": count * source.length, "epochs": count / source.per_epoch}
            for name, share, source, count in zip(
                self.names, self.shares, mixture.sources, mixture.consumed(position), strict=True
            )
        }


def load_data(config: TrainingConfig) -> Data:
    """Reads and checks the manifests of the data folders; prepares the quickstart's if it is missing, and downloads
    those on the Hub. Raises `UserError` for a damaged or unfinished folder, folders of different tokenizers, and one
    smaller than a sequence."""
    folders = list(map(local_folder, config.data.data))
    manifests = [_prepared(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.tokenizer.sha256 != manifests[0].tokenizer.sha256:
            raise UserError(
                f"{folder} was written with another tokenizer than {folders[0]}; prepare it again with "
                f"--tokenizer {folders[0] / 'tokenizer'}"
            )
        for split in ("train", "val"):
            if manifest.tokens(split) <= config.sequence_length:
                larger = f"it with --shard_tokens {config.sequence_length + 1} or more, or "
                raise UserError(
                    f"{folder}: {manifest.tokens(split)} tokens in split {split!r} do not fill a sequence of "
                    f"{config.sequence_length} and one label; lower sequence_length, or prepare "
                    f"{larger if split == 'val' and not manifest.is_registered else ''}more text"
                )
    return Data(config.data.data, folders, manifests, shares_of(manifests, config.data.data_weights))


def _prepared(folder: Path) -> Manifest:
    ready = (folder / FILE_NAME).exists() and Manifest.load(folder).unfinished is None
    if folder == Path(QUICKSTART_DATA) and not ready:
        print(f"preparing {folder} from the Python standard library's sources ...", flush=True)
        return prepare(Recipe(Source(BUILTIN), tokenizer="bpe"), folder)
    return Manifest.read(folder)


def validation_sequences(batches: Batches, tokens: int) -> int:
    """Number of sequences in a validation of about `tokens`, limited so that no source is read past its end."""
    mixture = batches.mixture
    count = tokens // mixture.sources[0].length
    ends = [(source.stream.tokens_per_epoch - 1) // source.length for source in mixture.sources]
    while count > 1 and (over := max(u / e for u, e in zip(mixture.consumed(count), ends, strict=True))) > 1:
        count = min(count - 1, int(count / over) + 1)
    return count

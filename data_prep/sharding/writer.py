"""Writes shards: blocks of documents are tokenized by threads and written in order."""

import contextlib
import errno
import queue
import shutil
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.common.files import partial_name
from data_prep.sharding.manifest import FILE_NAME, Manifest, Shard, text_marks
from data_prep.sharding.shards import ShardFile, Split, is_shard_name, shard_name
from data_prep.sources.corpus import Corpus, files_read
from data_prep.sources.formats import Block
from data_prep.sources.source import Position
from data_prep.tokenization.tokenizer import Encoder, HuggingFaceTokenizer, tokenizer_files

# Of which validation is the first.
SHARDS_OF_A_SMALL_CORPUS = 20
# Blocks in flight for each worker: enough work to cover a wait for the network.
_BLOCKS_AHEAD = 8
# Blocks that are read before they are asked for.
_BLOCKS_READ_AHEAD = 4
_SECONDS_BETWEEN_LINES = 30  # of progress, where no terminal is


class Progress:
    """A progress bar on a terminal, a line every 30 seconds elsewhere; in bytes of the corpus, if they are known."""

    def __init__(self, corpus: Corpus, start: Position) -> None:
        from tqdm import tqdm

        before, is_terminal = corpus.bytes_before(start), sys.stderr.isatty()
        self.bar = tqdm(
            total=None if before is None else corpus.bytes or None,
            initial=before or 0,
            unit="B",
            unit_scale=True,
            bar_format=None if is_terminal else "{desc}: {percentage:.0f}% in {elapsed}, {remaining} left\n",
            mininterval=0.1 if is_terminal else _SECONDS_BETWEEN_LINES,
            delay=0 if is_terminal else _SECONDS_BETWEEN_LINES,
        )
        self.tokens = self.documents = 0

    def update(self, block: Block, tokens: int, shards: int) -> None:
        """Counts a written block."""
        self.tokens += tokens
        self.documents += len(block.texts)
        speed = self.tokens / 1e6 / max(self.bar.format_dict["elapsed"], 1e-9)
        text = f"shard {shards}: {self.documents:,} documents, {self.tokens / 1e6:,.1f}M tokens, {speed:.2f}M tokens/s"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(block.size)

    def remaining_tokens(self) -> int | None:
        """Estimated number of tokens in the rest of the corpus; None if its size is not known."""
        if not self.bar.total:
            return None
        return int(self.tokens * max(0, self.bar.total - self.bar.n) / max(self.bar.n - self.bar.initial, 1))


class Writer:
    """Writes the shards of a folder, from the position in its manifest on.

    A shard gets its name when it is complete; then the manifest is replaced by one with this shard and the position
    after it. A process that is killed loses only its current shard.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.file: ShardFile | None = None
        self.documents = self.text_bytes = 0
        self.bad_files = manifest.bad_files
        self.counts_bytes = False
        for path in list(folder.iterdir()):
            if path.suffix == ".tmp" and is_shard_name(path.name, folder):  # of a killed process
                path.unlink()

    def write(self, corpus: Corpus, encoder: Encoder, workers: int) -> Manifest:
        """Writes the rest of the shards and returns the final manifest. Raises as `Corpus.blocks`, and a `UserError`
        for a full disk and for too little text (then nothing is left)."""
        if corpus.bad_files is not None:
            corpus.bad_files.update(self.bad_files)
            self.bad_files = corpus.bad_files
        position = self.manifest.unfinished or Position()
        self.counts_bytes = isinstance(encoder, HuggingFaceTokenizer)
        progress, skipped = Progress(corpus, position), position.tokens
        try:
            for block, tokens in tokenized(corpus.blocks(position), encoder, self.manifest.dtype, workers):
                self._add(block, tokens, min(skipped, len(tokens)))
                skipped -= min(skipped, len(tokens))
                progress.update(block, len(tokens), len(self.manifest.shards))
            if not self._only_dropped:
                return self._finish(corpus)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(self._disk_full(progress)) from error
        finally:
            progress.bar.close()
            if self.file is not None:
                self.file.discard()
        # Instead of nothing, training gets the rest of the document that validation ends in.
        self.manifest = replace(self.manifest, dropped_tokens=0, split_document=True)
        return self.write(corpus, encoder, workers)

    @property
    def _split(self) -> Split:
        return "train" if len(self.manifest.shards) >= self.manifest.val_shards else "val"

    @property
    def _only_dropped(self) -> bool:
        """Whether all that followed validation was dropped, as of a single document."""
        in_training = self.file is not None or len(self.manifest.shards) > self.manifest.val_shards
        return self.manifest.dropped_tokens > 0 and not in_training

    def _add(self, block: Block, tokens: np.ndarray, start: int) -> None:
        """Writes a block's tokens from index `start` on, and finishes the shards that they fill."""
        while start < len(tokens):
            if self.file is None:
                start += self._drop(tokens[start:])
                if start == len(tokens):
                    return
                name = shard_name(self.folder, self._split, len(self.manifest.shards), self.manifest.format)
                self.file, self.documents = ShardFile(self.folder / name, self.manifest.dtype), 0
                self.text_bytes = 0
                if self.manifest.split_document and len(self.manifest.shards) == self.manifest.val_shards:
                    self.file.add(np.array([self.manifest.tokenizer.eos_token_id], dtype=tokens.dtype))
                    self.documents = 1
            part = tokens[start : start + self.manifest.shard_tokens - self.file.tokens]
            self.file.add(part)
            self.documents += int(np.count_nonzero(part == self.manifest.tokenizer.eos_token_id))
            if self.counts_bytes:
                self._count_bytes(block.texts, tokens, start, start + len(part), self.file.tokens)
            start += len(part)
            if self.file.tokens == self.manifest.shard_tokens:
                self._finish_shard(self.file, replace(block.start, tokens=start))
                self.manifest.write(self.folder)

    def _count_bytes(self, texts: list[str], tokens: np.ndarray, start: int, stop: int, written: int) -> None:
        """Counts the text of tokens `start` to `stop`, with which the shard has `written`; interpolated."""
        ends = [*np.flatnonzero(tokens == self.manifest.tokenizer.eos_token_id), len(tokens)]
        sizes = [0, *np.cumsum([len(text.encode("utf-8")) for text in texts])]
        manifest, before = self.manifest, self.text_bytes - round(np.interp(start, ends, sizes))
        if self._split == "val":
            first = manifest.tokens("val") + written - stop  # token of the block
            unknown = islice(text_marks(), len(manifest.val_text_bytes), None)
            marks = [mark - first for mark in takewhile(lambda mark: mark <= first + stop, unknown)]
            found = np.rint(np.interp(marks, ends, sizes)).astype(int) + before + (manifest.text_bytes("val") or 0)
            self.manifest = replace(manifest, val_text_bytes=manifest.val_text_bytes + found.tolist())
        self.text_bytes = before + round(np.interp(stop, ends, sizes))

    def _drop(self, tokens: np.ndarray) -> int:
        """Number of tokens to drop: before the first training shard, the rest of validation's last document."""
        if len(self.manifest.shards) != self.manifest.val_shards or self.manifest.split_document:
            return 0
        starts = np.flatnonzero(tokens == self.manifest.tokenizer.eos_token_id)
        dropped = int(starts[0]) if len(starts) else len(tokens)
        self.manifest = replace(self.manifest, dropped_tokens=self.manifest.dropped_tokens + dropped)
        return dropped

    def _finish_shard(self, file: ShardFile, unfinished: Position | None) -> None:
        text_bytes = self.text_bytes if self.counts_bytes else None
        shard = Shard(file.path.name, self._split, file.tokens, self.documents, file.finish(), text_bytes)
        self.file = None
        shards, bad_files = [*self.manifest.shards, shard], dict(self.bad_files)
        self.manifest = replace(self.manifest, shards=shards, unfinished=unfinished, bad_files=bad_files)

    def _finish(self, corpus: Corpus) -> Manifest:
        if self.file is not None:
            self._finish_shard(self.file, None)
        if len(self.manifest.shards) <= self.manifest.val_shards:
            remove_files(self.folder)
            raise UserError(_too_small(corpus, self.manifest))
        self.manifest = replace(self.manifest, unfinished=None, bad_files=dict(self.bad_files))
        self.manifest.write(self.folder)
        return self.manifest

    def _disk_full(self, progress: Progress) -> str:
        itemsize = np.dtype(self.manifest.dtype).itemsize
        left = progress.remaining_tokens()
        rest = "" if left is None else f" and all that is left about {left * itemsize / 1e6:,.0f} MB"
        free = shutil.disk_usage(self.folder).free + (self.file.tokens * itemsize if self.file else 0)
        return (
            f"{self.folder}: the disk is full: {free / 1e6:,.0f} MB are free, the next shard takes "
            f"{self.manifest.shard_tokens * itemsize / 1e6:,.0f} MB{rest}; make room and run the same command again, "
            f"which goes on after the {len(self.manifest.shards)} shards that are finished"
        )


def remove_files(folder: Path) -> None:
    """Removes the files of preparation from `folder`, by their exact names, and the manifest, which shows that the
    folder is ours, last."""
    for path in tokenizer_files(folder / "tokenizer"):
        path.unlink()
    with contextlib.suppress(OSError):  # missing, or with files of others in it
        (folder / "tokenizer").rmdir()
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if is_shard_name(path.name, folder) or path.name == partial_name(FILE_NAME):
            path.unlink()
    (folder / FILE_NAME).unlink(missing_ok=True)


def tokenized(
    blocks: Iterable[Block], encoder: Encoder, dtype: str, workers: int
) -> Iterator[tuple[Block, np.ndarray]]:
    """Blocks with their tokens, in order, for any number of threads."""

    def encode(documents: list[Any]) -> np.ndarray:
        return encoder.encode(documents).astype(dtype)

    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[Block, Future[np.ndarray]]] = deque()
    failure = None
    try:
        try:
            for block in read_ahead(blocks, _BLOCKS_READ_AHEAD):
                if block.texts:
                    pending.append((block, pool.submit(encode, block.texts)))
                if len(pending) > _BLOCKS_AHEAD * workers:
                    block, tokens = pending.popleft()
                    yield block, tokens.result()
        except UserError as error:
            failure = error  # raised after the blocks before it
        for block, tokens in pending:
            yield block, tokens.result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)


def _too_small(corpus: Corpus, manifest: Manifest) -> str:
    tokens, name = manifest.tokens("val"), corpus.source.source
    if not tokens:
        read = f"; {files_read(len(corpus.paths), corpus.not_read, bad)}" if (bad := corpus.bad_files) else ""
        return f"source {name!r} yields no text{read}"
    return (
        f"source {name!r} yields {tokens} tokens, which leaves nothing for training after {manifest.val_shards} "
        f"validation shard(s) of {manifest.shard_tokens}; choose --shard_tokens "
        f"{max(1, tokens // (SHARDS_OF_A_SMALL_CORPUS * manifest.val_shards))}, or more text"
    )


Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, of which a thread reads up to `count` before they are asked for; its error is raised in its turn.

    The thread is a daemon: nobody waits for a network that does not answer once the program ends.
    """
    found: queue.SimpleQueue[object] = queue.SimpleQueue()
    room, closed = threading.Semaphore(count), threading.Event()

    def read() -> None:
        try:
            for item in items:
                found.put(item)
                room.acquire()
                if closed.is_set():
                    return
            found.put(_END)
        except BaseException as error:
            found.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (item := found.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        room.release()

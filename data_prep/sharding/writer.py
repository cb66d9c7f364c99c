"""Shards out of blocks of documents: tokenized by threads, written in order, one finished shard after the other."""

import contextlib
import errno
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.common.files import partial_name
from data_prep.common.records import Position, Shard
from data_prep.reading.readers import Block, Cursor
from data_prep.reading.sources import Corpus
from data_prep.sharding.manifest import FILE_NAME, Manifest
from data_prep.sharding.progress import Progress
from data_prep.sharding.shards import ShardFile, is_shard_name, shard_name
from data_prep.tokenization.tokenizer import Tokenizer, tokenizer_files

# Blocks in flight for each worker: enough work to bridge a wait for the network.
_BLOCKS_AHEAD = 8


class Writer:
    """Fills the shards of a folder, from where its manifest says.

    Tokens go into the file of the current shard, which appears under its name when it is full; then the manifest is
    replaced by one that counts it and says where to go on. A process that dies loses the current shard only.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.eos_token_id = manifest.tokenizer.eos_token_id
        self.file: ShardFile | None = None
        self.documents = 0
        for path in list(folder.iterdir()):
            if path.suffix == ".tmp" and is_shard_name(path.name, folder):  # of a process that was killed
                path.unlink()

    def write(self, corpus: Corpus, tokenizer: Tokenizer, workers: int) -> Manifest:
        """Write all that is left, and return the manifest of the finished folder.

        Raises:
            UserError: for a full disk, for too little text (of which nothing is left), and as `Corpus.blocks`.
        """
        position = self.manifest.unfinished
        cursor, skipped = Cursor(position.file, position.record, position.offset), position.tokens
        with Progress(corpus, cursor) as progress:
            try:
                blocks = corpus.blocks(cursor)
                for block, tokens in tokenized(blocks, tokenizer, self.manifest.dtype, workers):
                    self._add(block, tokens, min(skipped, len(tokens)))
                    skipped -= min(skipped, len(tokens))
                    progress.update(block, len(tokens), self.manifest)
                return self._finish(corpus)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise UserError(self._disk_full(progress)) from error
            finally:
                if self.file is not None:
                    self.file.discard()

    def _add(self, block: Block, tokens: np.ndarray, start: int) -> None:
        """Write a block's tokens from number `start` on, and finish each shard that they fill."""
        while start < len(tokens):
            if self.file is None:
                start += self._drop(tokens[start:])
                if start == len(tokens):
                    return
                self.file, self.documents = ShardFile(self._path(), self.manifest.dtype), 0
            taken = tokens[start : start + self.manifest.shard_tokens - self.file.tokens]
            self.file.add(taken)
            self.documents += int(np.count_nonzero(taken == self.eos_token_id))
            start += len(taken)
            if self.file.tokens == self.manifest.shard_tokens:
                self._finish_shard(Position(**asdict(block.start), tokens=start))
                self.manifest.write(self.folder)

    def _drop(self, tokens: np.ndarray) -> int:
        """How many of these tokens to leave out: where training begins, the rest of validation's last document."""
        if len(self.manifest.shards) != self.manifest.val_shards:
            return 0
        starts = np.flatnonzero(tokens == self.eos_token_id)
        dropped = int(starts[0]) if len(starts) else len(tokens)
        self.manifest = replace(self.manifest, dropped_tokens=self.manifest.dropped_tokens + dropped)
        return dropped

    def _path(self) -> Path:
        number = len(self.manifest.shards)
        return self.folder / shard_name(self.folder, self._split(), number, self.manifest.format)

    def _split(self) -> str:
        return "train" if len(self.manifest.shards) >= self.manifest.val_shards else "val"

    def _finish_shard(self, unfinished: Position | None) -> None:
        digest = self.file.finish()
        shard = Shard(self.file.path.name, self._split(), self.file.tokens, self.documents, digest)
        self.file = None
        self.manifest = replace(self.manifest, shards=[*self.manifest.shards, shard], unfinished=unfinished)

    def _finish(self, corpus: Corpus) -> Manifest:
        if self.file is not None:
            self._finish_shard(None)
        if len(self.manifest.shards) <= self.manifest.val_shards:
            remove_files(self.folder)
            raise UserError(_too_small(corpus, self.manifest))
        self.manifest = replace(self.manifest, unfinished=None)
        self.manifest.write(self.folder)
        return self.manifest

    def _disk_full(self, progress: Progress) -> str:
        itemsize = np.dtype(self.manifest.dtype).itemsize
        free = shutil.disk_usage(self.folder).free + (self.file.tokens * itemsize if self.file else 0)
        return (
            f"{self.folder}: the disk is full: {free / 1e6:,.0f} MB are free, the next shard takes "
            f"{self.manifest.shard_tokens * itemsize / 1e6:,.0f} MB and all that is left about "
            f"{progress.tokens_to_come() * itemsize / 1e6:,.0f} MB; make room and run the same command again, which "
            f"goes on after the {len(self.manifest.shards)} shards that are finished"
        )


def remove_files(folder: Path) -> None:
    """Remove all that preparation writes into `folder`, by its exact names; the manifest, by which it knows the folder
    for its own, last."""
    for path in tokenizer_files(folder / "tokenizer"):
        path.unlink()
    with contextlib.suppress(OSError):  # it is not there, or has something in it that is not ours
        (folder / "tokenizer").rmdir()
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if is_shard_name(path.name, folder) or path.name == partial_name(FILE_NAME):
            path.unlink()
    (folder / FILE_NAME).unlink(missing_ok=True)


def tokenized(
    blocks: Iterable[Block], tokenizer: Tokenizer, dtype: str, workers: int
) -> Iterator[tuple[Block, np.ndarray]]:
    """Each block with its tokens, in the order of the blocks, however many threads work on them."""

    def encode(block: Block) -> np.ndarray:
        return tokenizer.encode(block.texts).astype(dtype)

    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[Block, Future[np.ndarray]]] = deque()
    failure = None
    try:
        try:
            for block in blocks:
                if block.texts:
                    pending.append((block, pool.submit(encode, block)))
                if len(pending) > _BLOCKS_AHEAD * workers:
                    block, tokens = pending.popleft()
                    yield block, tokens.result()
        except UserError as error:
            failure = error  # raised once what was read before it has been written
        for block, tokens in pending:
            yield block, tokens.result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)


def _too_small(corpus: Corpus, manifest: Manifest) -> str:
    tokens, name = manifest.tokens("val") + manifest.dropped_tokens, corpus.source.source
    if not tokens:
        return f"source {name!r} yields no text"
    return (
        f"source {name!r} yields {tokens} tokens, which leaves no document for training after {manifest.val_shards} "
        f"validation shard(s) of {manifest.shard_tokens}; choose a smaller --shard_tokens or more text"
    )

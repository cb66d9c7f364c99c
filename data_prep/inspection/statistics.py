"""Counts over the shards of a data folder."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.shards import open_shard, token_documents
from data_prep.tokenization.byte_level import bytes_of_tokens
from data_prep.tokenization.tokenizer import hf_tokenizer

_CHUNK_TOKENS = 1 << 22


@dataclass
class Statistics:
    """Counts over all shards of a folder.

    Attributes:
        text_bytes: of the documents; None if neither the tokens nor the manifest tell it.
        lengths: number of documents by length in tokens: element k has those from 2^k to 2^(k+1) - 1.
    """

    tokens: int
    documents: int
    text_bytes: int | None
    lengths: np.ndarray

    @property
    def fertility(self) -> str:
        """Bytes of text per token, ends of text not counted."""
        if self.text_bytes is None:
            return "not available"
        return f"{self.text_bytes / (self.tokens - self.documents):.3f} bytes per token"

    def length_rows(self) -> list[tuple[int, int, int]]:
        """First and last length of each power of two that occurs, or lies between, and the number of documents."""
        used = np.flatnonzero(self.lengths)
        return [(2**k, 2 ** (k + 1) - 1, int(self.lengths[k])) for k in range(used[0], used[-1] + 1)]


def statistics(folder: Path, manifest: Manifest) -> Statistics:
    """Counts tokens, documents and bytes, with one shard in memory at a time."""
    tokenizer = hf_tokenizer(folder / "tokenizer")
    sizes, counts = bytes_of_tokens(tokenizer), np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    lengths = np.zeros(33, dtype=np.int64)
    for split in ("val", "train"):
        paths = [folder / shard.file for shard in manifest.shards if shard.split == split]
        for document in token_documents(paths, manifest.tokenizer.eos_token_id):
            lengths[len(document).bit_length() - 1] += 1
    for shard in manifest.shards:
        tokens = open_shard(folder / shard.file)
        for start in range(0, len(tokens), _CHUNK_TOKENS):  # bincount converts to int64
            found = np.bincount(tokens[start : start + _CHUNK_TOKENS], minlength=len(counts))
            if len(found) > len(counts):
                raise UserError(f"{folder / shard.file}: ids beyond the vocabulary; run python -m data_prep.verify")
            counts += found
    text_bytes = manifest.text_bytes("train", "val") if sizes is None else int(counts @ sizes)
    return Statistics(int(counts.sum()), int(lengths.sum()), text_bytes, lengths)

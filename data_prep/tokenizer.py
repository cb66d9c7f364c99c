"""Byte-level BPE: GPT-2's, or one trained on the corpus. Run by tiktoken, saved for `AutoTokenizer`."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from data_prep.cli import UserError

END_OF_TEXT = "<|endoftext|>"
# GPT-2's split into words, as its authors released it.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BATCH_CHARACTERS = 4 * 1024 * 1024


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE with one special token, the end of text, whose id is the last.

    Attributes:
        name: how the manifest calls it.
        encoding: the tiktoken encoding that runs it.
    """

    name: str
    encoding: tiktoken.Encoding

    @property
    def vocab_size(self) -> int:
        return self.encoding.n_vocab

    @property
    def eos_token_id(self) -> int:
        return self.encoding.eot_token

    def encode(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """Each document as `[tokens]` uint32: the end-of-text token, then its text.

        Text that looks like a special token is encoded as text. Memory is bounded by a few million characters and
        the longest document.
        """
        for batch in _batches(documents):
            for ids in self.encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1):
                yield np.array([self.eos_token_id, *ids], dtype=np.uint32)

    def save(self, folder: Path) -> str:
        """Write what `AutoTokenizer` loads, with the same id for every text; return the sha256 of `tokenizer.json`."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as FastTokenizer

        ranks = self.encoding._mergeable_ranks
        vocab = {_printable(token): rank for token, rank in ranks.items()}
        merges = [(_printable(left), _printable(right)) for left, right in _merges(ranks)]
        fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        assert fast.token_to_id(END_OF_TEXT) == self.eos_token_id

        folder.mkdir(parents=True)
        fast.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return tokenizer_hash(folder)


def tokenizer_hash(folder: Path) -> str:
    """sha256 of a tokenizer folder's `tokenizer.json`: two folders of one hash give the same ids."""
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own BPE, 50257 tokens, from tiktoken's cache or the network.

    Raises:
        UserError: where neither has it.
    """
    try:
        return Tokenizer("gpt2", tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError) as error:
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
        raise UserError(
            f"GPT-2's vocabulary is not in tiktoken's cache (TIKTOKEN_CACHE_DIR: {cache}) and cannot be downloaded. "
            f"Connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that has it, or train a tokenizer on "
            f"the corpus with --tokenizer bpe."
        ) from error


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, the end of text included, trained on `documents`.

    Raises:
        UserError: for a size below 257, and for a corpus too small to yield so many tokens.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: the 256 bytes and the end of text need at least 257 tokens")
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    )
    if fast.get_vocab_size() < vocab_size - 1:
        raise UserError(
            f"vocab_size={vocab_size}: the corpus yields only {fast.get_vocab_size() + 1} tokens; "
            f"choose at most that many, or more text"
        )
    to_byte = {_printable(bytes([byte])): byte for byte in range(256)}
    ranks = {bytes(to_byte[c] for c in token): rank for token, rank in fast.get_vocab().items()}
    encoding = tiktoken.Encoding(
        f"bpe-{vocab_size}",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: vocab_size - 1},
        explicit_n_vocab=vocab_size,
    )
    return Tokenizer(encoding.name, encoding)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _printable(token: bytes) -> str:
    """GPT-2's spelling of bytes: Latin-1 where that is visible, characters from 256 on for the others."""
    return "".join(map(_BYTE_TO_CHARACTER.__getitem__, token))


def _byte_to_character() -> dict[int, str]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_BYTE_TO_CHARACTER = _byte_to_character()


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in order of rank: what is left of it under the ranks below its own."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        yield parts[0], parts[1]

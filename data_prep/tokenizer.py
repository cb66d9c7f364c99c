"""Tokenizers: GPT-2's, one trained on the corpus, or any that `AutoTokenizer` loads. tiktoken runs all that it can."""

import hashlib
import itertools
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_prep.cli import UserError

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
# Longer documents are encoded in chunks, each of which takes about 100 bytes of memory a character at worst.
_CHUNK_CHARACTERS = 1 << 20
_CHUNK_END = re.compile(r"\S(?=[ \n])")


class Tokenizer(Protocol):
    """Text to ids.

    Attributes:
        name: how the manifest calls it.
        vocab_size: the largest id is one less.
        eos_token_id: the end of text, which every document begins with.
    """

    name: str
    vocab_size: int
    eos_token_id: int

    def encode(self, texts: list[str]) -> np.ndarray:
        """The documents' ids one after the other, `[tokens]` uint32, the end of text before each.

        Text that looks like a special token is encoded as text. Threads may call this at the same time; it holds the
        interpreter's lock for little of its time.
        """

    def save(self, folder: Path) -> str:
        """Write what `AutoTokenizer` loads, with the same ids for every text; return the sha256 of `tokenizer.json`."""


class ByteLevelTokenizer:
    """A byte-level BPE with GPT-2's split into words and one special token, run by tiktoken."""

    def __init__(self, name: str, ranks: dict[bytes, int], eos_token_id: int) -> None:
        self.name, self.eos_token_id = name, eos_token_id
        self.ranks = ranks
        self.vocab_size = max(*ranks.values(), eos_token_id) + 1
        self._of_thread = threading.local()

    @property
    def encoding(self) -> "tiktoken.Encoding":
        """tiktoken's encoding, one for each thread: threads that share one wait for its regular expression (a fifth of
        their time, for two)."""
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        if not hasattr(self._of_thread, "encoding"):
            self._of_thread.encoding = tiktoken.Encoding(
                self.name,
                pat_str=r50k_pat_str,
                mergeable_ranks=self.ranks,
                special_tokens={END_OF_TEXT: self.eos_token_id},
            )
        return self._of_thread.encoding

    def encode(self, texts: list[str]) -> np.ndarray:
        """As in `Tokenizer`. Memory is bounded for any length of document."""
        eos = np.array([self.eos_token_id], dtype=np.uint32)
        encode = self.encoding.encode_to_numpy
        pieces = []
        for text in texts:
            pieces.append(eos)
            for chunk in chunks(text, _CHUNK_CHARACTERS):
                pieces.append(encode(chunk, disallowed_special=()))
        return np.concatenate(pieces) if pieces else eos[:0]

    def save(self, folder: Path) -> str:
        """As in `Tokenizer`."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        vocab = {_printable(token): rank for token, rank in self.ranks.items()}
        merges = [(_printable(left), _printable(right)) for left, right in _merges(self.ranks)]
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        assert backend.token_to_id(END_OF_TEXT) == self.eos_token_id

        folder.mkdir(parents=True, exist_ok=True)
        backend.save(str(folder / "tokenizer.json"))
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return tokenizer_hash(folder)


class HuggingFaceTokenizer:
    """Any other tokenizer, run by the `tokenizers` library."""

    def __init__(self, name: str, tokenizer: Any) -> None:
        from tokenizers import Tokenizer as Backend

        self.name, self.tokenizer = name, tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.backend = Backend.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True

    def encode(self, texts: list[str]) -> np.ndarray:
        """As in `Tokenizer`. Memory grows with the longest document: where such a tokenizer may be cut is not known."""
        documents = [encoded.ids for encoded in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        for i, ids in enumerate(documents):
            if self.eos_token_id in ids:  # some models take its spelling for a word of theirs
                parts = self.backend.encode_batch_fast(self._spelled_apart(texts[i]), add_special_tokens=False)
                documents[i] = [number for part in parts for number in part.ids if number != self.eos_token_id]
        return np.concatenate([np.array([self.eos_token_id, *ids], dtype=np.uint32) for ids in documents])

    def _spelled_apart(self, text: str) -> list[str]:
        """The text, cut within each spelling of the end of text."""
        spelling = self.tokenizer.eos_token
        halves = re.escape(spelling[: len(spelling) // 2]), re.escape(spelling[len(spelling) // 2 :])
        return re.split(f"(?<={halves[0]})(?={halves[1]})", text)

    def save(self, folder: Path) -> str:
        """As in `Tokenizer`."""
        self.tokenizer.save_pretrained(folder)
        return tokenizer_hash(folder)


def describe_tokenizer(tokenizer: Tokenizer, sha256: str) -> dict[str, Any]:
    """What the manifest says of a tokenizer, given the hash of its `tokenizer.json`."""
    return {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "sha256": sha256,
    }


def tokenizer_hash(folder: Path) -> str:
    """sha256 of a tokenizer folder's `tokenizer.json`: two folders of one hash give the same ids."""
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own BPE, 50257 tokens, from tiktoken's cache or the network.

    Raises:
        UserError: where neither has it.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
        raise UserError(
            f"GPT-2's vocabulary is not in tiktoken's cache (TIKTOKEN_CACHE_DIR: {cache}) and cannot be downloaded. "
            f"Connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that has it, or train a tokenizer on "
            f"the corpus with --tokenizer bpe."
        ) from error
    return ByteLevelTokenizer("gpt2", encoding._mergeable_ranks, encoding.eot_token)


def load_tokenizer(source: str | Path, name: str | None = None) -> Tokenizer:
    """The tokenizer that `AutoTokenizer` loads from a folder or the Hub, with the same id for every text.

    Raises:
        UserError: where there is none, one without an end of text, or one that the `tokenizers` library does not run.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tokenizer {str(source)!r}: {reason}") from error
    name = name or str(source)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no end-of-text token (eos_token), which every document begins with")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer {name!r} has no tokenizer.json; only those run by the tokenizers library are read")
    ranks = _byte_level_ranks(json.loads(backend.to_str()), tokenizer.eos_token_id)
    if ranks is not None:
        return ByteLevelTokenizer(name, ranks, tokenizer.eos_token_id)
    return HuggingFaceTokenizer(name, tokenizer)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, the end of text included, trained on `documents`.

    Raises:
        UserError: for a size below 257, and for a corpus too small to yield so many tokens.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: the 256 bytes and the end of text need at least 257 tokens")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    )
    if backend.get_vocab_size() < vocab_size - 1:
        raise UserError(
            f"vocab_size={vocab_size}: the corpus yields only {backend.get_vocab_size() + 1} tokens; "
            f"choose at most that many, or more text"
        )
    ranks = {_unprintable(token): rank for token, rank in backend.get_vocab().items()}
    return ByteLevelTokenizer(f"bpe-{vocab_size}", ranks, vocab_size - 1)


def bytes_of_tokens(tokenizer: Any) -> np.ndarray:
    """How many bytes of text each id of a `transformers` tokenizer stands for, `[V]` int64; 0 for special tokens.

    Tokens are spelled in one of three ways: in GPT-2's alphabet of bytes, as `<0x0A>` for one byte, or as text with
    U+2581 for a space (SentencePiece). Those that were added to a vocabulary are text.
    """
    vocab, added, special = tokenizer.get_vocab(), tokenizer.get_added_vocab(), set(tokenizer.all_special_ids)
    counts = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    byte_level = set("".join(token for token in vocab if token not in added)) <= _CHARACTER_TO_BYTE.keys()
    for token, number in vocab.items():
        if number in special:
            continue
        if byte_level and token not in added:
            counts[number] = len(token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            counts[number] = 1
        else:
            counts[number] = len(token.replace("\u2581", " ").encode("utf-8"))
    return counts


def chunks(text: str, size: int) -> Iterator[str]:
    """A text in chunks of at most `size` characters that GPT-2's split into words treats as it treats the whole.

    It never joins a space or a line's end to what is before it, unless that is white space too, so a chunk may end
    there. A chunk without any such place is cut where it is full: `size` characters in a row are no words.
    """
    start = 0
    while len(text) - start > size:
        stop = start + size
        for looked_at in (4096, size):
            places = [match.end() for match in _CHUNK_END.finditer(text, max(start, stop - looked_at), stop + 1)]
            if places:
                stop = places[-1]
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _byte_level_ranks(state: dict[str, Any], eos_token_id: int) -> dict[bytes, int] | None:
    """The ranks with which tiktoken merges as this tokenizer of the `tokenizers` library does; None if it cannot."""
    model, split = state["model"], state["pre_tokenizer"] or {}
    plain = (
        model["type"] == "BPE"
        and split.get("type") == "ByteLevel"
        and not split["add_prefix_space"]
        and split.get("use_regex", True)
        and state["normalizer"] is None
        and not any(model.get(name) for name in ("dropout", "byte_fallback", "ignore_merges"))
        and not any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        and [token["id"] for token in state["added_tokens"]] == [eos_token_id]
    )
    if not plain:
        return None
    words = {token: number for token, number in model["vocab"].items() if number != eos_token_id}
    if set(words.values()) != set(range(eos_token_id)) or not set("".join(words)) <= _CHARACTER_TO_BYTE.keys():
        return None
    ranks = {_unprintable(token): number for token, number in words.items()}
    merges = [(_unprintable(left), _unprintable(right)) for left, right in model["merges"]]
    return ranks if merges == list(_merges(ranks)) else None


def _byte_to_character() -> dict[int, str]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


# GPT-2's spelling of bytes: Latin-1 where that is visible, characters from 256 on for the others.
_BYTE_TO_CHARACTER = _byte_to_character()
_CHARACTER_TO_BYTE = {character: byte for byte, character in _BYTE_TO_CHARACTER.items()}


def _printable(token: bytes) -> str:
    return "".join(map(_BYTE_TO_CHARACTER.__getitem__, token))


def _unprintable(token: str) -> bytes:
    return bytes(map(_CHARACTER_TO_BYTE.__getitem__, token))


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token was merged from, in order of rank: what is left of it under the ranks below its own."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        possible = [
            (left, right)
            for i in range(1, len(token))
            if ranks.get(left := token[:i], rank) < rank and ranks.get(right := token[i:], rank) < rank
        ]
        if len(possible) == 1:  # nearly always
            yield possible[0]
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        yield parts[0], parts[1]

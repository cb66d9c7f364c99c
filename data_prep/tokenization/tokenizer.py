"""Tokenizers: GPT-2's, one trained on the corpus, or any that `AutoTokenizer` loads; run by tiktoken where possible."""

import json
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_prep.common.command_line import UserError, first_line
from data_prep.common.files import describe_path, file_hash
from data_prep.common.hub import limit_waiting
from data_prep.common.schema import STRICT, Count, Positive, Sha256, read_json
from data_prep.tokenization.byte_level import byte_level_ranks, bytes_to_unicode, chunks, merges, unicode_to_bytes

if TYPE_CHECKING:
    import tiktoken
    from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
# Files of transformers' `save_pretrained`.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "chat_template.jinja")  # fmt: skip
# Longer documents are encoded in chunks; each takes at most about 100 bytes of memory per character.
CHUNK_CHARACTERS = 1 << 20
_MAX_IDS = 1 << 24  # ten times as many as any published vocabulary
_SAMPLE_IDS = 1024  # of each call that takes ids
_SHARE_THAT_RETURNS = 0.9  # of a sample, decoded and encoded again; words cut at its ends may not
_LONGEST_WORD = 2048  # bytes; the time to train a tokenizer grows with the square of their length


@dataclass(frozen=True)
class TokenizerRecord:
    """The shards' tokenizer; `sha256` is the hash of `tokenizer/tokenizer.json`."""

    __pydantic_config__ = STRICT

    name: str
    vocab_size: Positive
    eos_token_id: Count
    sha256: Sha256


class Encoder(Protocol):
    """Converts documents to ids."""

    def encode(self, documents: list[Any], /) -> np.ndarray:
        """Ids of the documents, concatenated, each after an end of text: `[tokens]` uint32. Thread-safe."""


class Tokenizer(Protocol):
    """Converts text to ids.

    Attributes:
        name: in the manifest.
        vocab_size: the largest id + 1.
        eos_token_id: end of text; every document begins with it.
    """

    name: str
    vocab_size: int
    eos_token_id: int

    def encode(self, texts: list[str], /) -> np.ndarray:
        """As in `Encoder`. Text that looks like a special token is encoded as text. Mostly without the interpreter's
        lock."""

    def decode(self, ids: np.ndarray) -> str:
        """Text of `ids`, `[tokens]`; bytes that are not UTF-8 are replaced."""

    def save(self, folder: Path) -> str:
        """Writes files that `AutoTokenizer` loads, with the same ids; returns the sha256 of `tokenizer.json`."""


class ByteLevelTokenizer:
    """Byte-level BPE with GPT-2's split into words and one special token, run by tiktoken."""

    def __init__(self, name: str, ranks: dict[bytes, int], eos_token_id: int) -> None:
        self.name, self.ranks, self.eos_token_id = name, ranks, eos_token_id
        self.vocab_size = max(*ranks.values(), eos_token_id) + 1
        self._local = threading.local()

    @property
    def encoding(self) -> "tiktoken.Encoding":
        """tiktoken's encoding, one per thread: threads that share one spend a fifth of their time waiting for its
        regular expression."""
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str

        if not hasattr(self._local, "encoding"):
            options = {"mergeable_ranks": self.ranks, "special_tokens": {END_OF_TEXT: self.eos_token_id}}
            self._local.encoding = tiktoken.Encoding(self.name, pat_str=r50k_pat_str, **options)  # type: ignore[arg-type]
        return self._local.encoding

    def encode(self, texts: list[str]) -> np.ndarray:
        """As in `Tokenizer`. Memory is bounded for documents of any length."""
        eos = np.array([self.eos_token_id], dtype=np.uint32)
        encode = self.encoding.encode_to_numpy
        pieces = []
        for text in texts:
            pieces.append(eos)
            pieces += [encode(chunk, disallowed_special=()) for chunk in chunks(text, CHUNK_CHARACTERS)]
        return np.concatenate(pieces) if pieces else eos[:0]

    def decode(self, ids: np.ndarray) -> str:
        """As in `Tokenizer`."""
        return self.encoding.decode(ids.tolist())

    @cached_property
    def backend(self) -> "Backend":
        """The same tokenizer in the `tokenizers` library."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        vocab = {bytes_to_unicode(token): rank for token, rank in self.ranks.items()}
        pairs = [(bytes_to_unicode(left), bytes_to_unicode(right)) for left, right in merges(self.ranks)]
        backend = Backend(models.BPE(vocab=vocab, merges=pairs))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
        assert backend.token_to_id(END_OF_TEXT) == self.eos_token_id
        return backend

    def save(self, folder: Path) -> str:
        """As in `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
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
        """As in `Tokenizer`. Memory grows with the longest document, as such a tokenizer has no known safe cuts."""

        def ids_of(texts: list[str]) -> list[list[int]]:
            return [encoded.ids for encoded in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

        documents = _encode(ids_of, self.tokenizer, texts)
        return np.concatenate([np.array([self.eos_token_id, *ids], dtype=np.uint32) for ids in documents])

    def decode(self, ids: np.ndarray) -> str:
        """As in `Tokenizer`."""
        return self.backend.decode(ids.tolist(), skip_special_tokens=False)

    def save(self, folder: Path) -> str:
        """As in `Tokenizer`."""
        self.tokenizer.save_pretrained(folder)
        return tokenizer_hash(folder)


class TokenIds:
    """Passes through documents that are already token ids, as in published token sets, and checks them against a
    tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name, self.vocab_size, self.eos_token_id = tokenizer.name, tokenizer.vocab_size, tokenizer.eos_token_id
        self.tokenizer = tokenizer

    def encode(self, documents: list[np.ndarray], /) -> np.ndarray:
        """Concatenated ids of the documents, each after exactly one end of text, its own if it starts or ends with one.

        Raises:
            UserError: for ids that the tokenizer does not have, and for a sample whose text it encodes otherwise.
        """
        pieces, eos = [], np.array([self.eos_token_id], dtype=np.uint32)
        for ids in documents:
            if len(wrong := ids[(ids < 0) | (ids >= self.vocab_size)]):
                ids_of = f"the {self.vocab_size:,} ids of tokenizer {self.name!r}"
                raise UserError(f"token id {wrong[0]} is not among {ids_of}; name the tokenizer that made the column")
            start, stop = int(ids[0] == self.eos_token_id), len(ids) - int(ids[-1] == self.eos_token_id)
            pieces += [eos, ids[start:stop].astype(np.uint32)] if start < stop else []
        tokens = np.concatenate(pieces) if pieces else eos[:0]
        self._compare(tokens[:_SAMPLE_IDS])
        return tokens

    def _compare(self, sample: np.ndarray) -> None:
        """Refuses ids if the tokenizer encodes their text differently (`UserError`)."""
        documents = np.split(sample, np.flatnonzero(sample == self.eos_token_id))
        again = self.tokenizer.encode([self.tokenizer.decode(ids[1:]) for ids in documents[1:]])
        found, again = (ids[ids != self.eos_token_id] for ids in (sample, again))
        same = (Counter(found.tolist()) & Counter(again.tolist())).total()
        if same < _SHARE_THAT_RETURNS * max(len(found), len(again)):
            shown = ", ".join(map(str, found[:8]))
            raise UserError(
                f"the token ids {shown}, ... are not those of tokenizer {self.name!r}: of {len(found)}, {same} come "
                f"back when their text is encoded again; name the tokenizer that made the column"
            )


def describe_tokenizer(tokenizer: Tokenizer, sha256: str) -> TokenizerRecord:
    """Returns the manifest's record of a tokenizer; `sha256` is the hash of its `tokenizer.json`."""
    return TokenizerRecord(tokenizer.name, tokenizer.vocab_size, tokenizer.eos_token_id, sha256)


def tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer files in `folder`, recognized by name."""
    return [folder / name for name in _FILES if (folder / name).is_file()]


def tokenizer_hash(folder: Path) -> str:
    """sha256 of a folder's `tokenizer.json`; equal hashes mean equal ids."""
    return file_hash(Path(folder) / "tokenizer.json")


def tokenizer_problem(tokenizer: Any, record: TokenizerRecord) -> str | None:
    """Difference between a tokenizer from `hf_tokenizer` and the manifest's record, or None."""
    found = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": max(tokenizer.get_vocab().values()) + 1}
    expected = {name: getattr(record, name) for name in found}
    wrong = [f"{name}={value}, not {expected[name]}" for name, value in found.items() if value != expected[name]]
    return f"the tokenizer is another one than the manifest says ({'; '.join(wrong)})" if wrong else None


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's BPE of 50257 tokens, from tiktoken's cache or the network (`UserError` if neither has it)."""
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        cache = os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
        raise UserError(
            f"GPT-2's vocabulary is not in tiktoken's cache (TIKTOKEN_CACHE_DIR: {cache}) and cannot be downloaded "
            f"({first_line(error)}). Connect to the network once, set TIKTOKEN_CACHE_DIR to a folder that has it, or "
            f"train a tokenizer on the corpus with --tokenizer bpe."
        ) from error
    return ByteLevelTokenizer("gpt2", encoding._mergeable_ranks, encoding.eot_token)


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, exactly as `prepare` writes them: no tokens from the template, and spellings of special
    tokens are plain text."""

    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    return _encode(ids_of, tokenizer, texts)


def _encode(ids_of: Callable[[list[str]], list[list[int]]], tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text by `ids_of`, without end-of-text tokens, whose spelling is an ordinary word in some models."""
    documents, eos, spelling = ids_of(texts), tokenizer.eos_token_id, tokenizer.eos_token
    for i, ids in enumerate(documents):
        if eos in ids:
            # Encoded in parts that end in the middle of each spelling.
            halves = re.escape(spelling[: len(spelling) // 2]), re.escape(spelling[len(spelling) // 2 :])
            parts = ids_of(re.split(f"(?<={halves[0]})(?={halves[1]})", texts[i]))
            documents[i] = [number for part in parts for number in part if number != eos]
    return documents


def encode_document(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a document, starting with end of text; otherwise as `encode` (`UserError` for a tokenizer without an
    end-of-text token)."""
    _check_end_of_text(tokenizer, tokenizer.name_or_path)
    return [tokenizer.eos_token_id, *encode(tokenizer, [text])[0]]


def _check_end_of_text(tokenizer: Any, name: str) -> None:
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no end-of-text token (eos_token), which every document begins with")


def hf_tokenizer(source: str | Path) -> Any:
    """Loads a tokenizer with `AutoTokenizer` from a folder or the Hub without running code from the repository
    (`UserError` if it is missing, damaged, or needs such code)."""
    from transformers import AutoTokenizer

    file = Path(source) / "tokenizer.json"
    if file.is_file():
        _check_ids(file)
    try:
        if not Path(source).is_dir():
            limit_waiting()
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # files of unknown origin: the libraries that read them raise many types
        raise UserError(f"tokenizer {str(source)!r}: {missing_tokenizer(source) or first_line(error)}") from error


def missing_tokenizer(source: str | Path) -> str | None:
    """Returns the remedy for a folder without a tokenizer; None for a folder with one, or a name on the Hub."""
    folder = Path(source)
    if not folder.is_dir() or any((*folder.glob("tokenizer?*"), *folder.glob("vocab*"))):
        return None
    kind = describe_path(folder)
    return "no tokenizer in it; " + (
        "copy tokenizer.json and its config there" if kind in (None, "a model") else f"it is {kind}"
    )


def _check_ids(file: Path) -> None:
    """Refuses implausibly large ids (`UserError`): the libraries allocate tables up to the largest id."""
    content = read_json(file, dict[str, Any])
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    for number in ids:
        if type(number) is not int or not 0 <= number < _MAX_IDS:
            raise UserError(f"{file}: {number!r} is not the id of a token, a whole number from 0 to {_MAX_IDS - 1:,}")


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads `gpt2`, or a tokenizer from a folder or the Hub with the ids of `AutoTokenizer`. Raises as `hf_tokenizer`,
    and `UserError` for a tokenizer without end of text or without `tokenizer.json`."""
    if source == "gpt2":
        return gpt2_tokenizer()
    tokenizer, name = hf_tokenizer(source), str(source)
    _check_end_of_text(tokenizer, name)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer {name!r} has no tokenizer.json; only those run by the tokenizers library are read")
    ranks = byte_level_ranks(json.loads(backend.to_str()), tokenizer.eos_token_id)
    if ranks is None:
        return HuggingFaceTokenizer(name, tokenizer)
    return ByteLevelTokenizer(name, ranks, tokenizer.eos_token_id)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, including the end of text (`UserError` for fewer than 257, or
    more than the corpus yields)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size={vocab_size}: the 256 bytes and the end of text need at least 257 tokens")
    backend = Backend(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(_LONGEST_WORD)])
    alphabet, shows = words.alphabet(), sys.stderr.isatty()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=shows)
    backend.train_from_iterator(documents, trainer)
    if (size := backend.get_vocab_size() + 1) < vocab_size:
        text = f"the corpus yields only {size} tokens; choose at most that many, or more text"
        raise UserError(f"vocab_size={vocab_size}: {text}")
    ranks = {unicode_to_bytes(token): rank for token, rank in backend.get_vocab().items()}
    return ByteLevelTokenizer(f"bpe-{vocab_size}", ranks, vocab_size - 1)

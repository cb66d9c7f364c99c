"""Tokenizers: GPT-2's, one trained on the corpus, or any that `AutoTokenizer` loads. tiktoken runs all that it can."""

import json
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from data_prep.common.command_line import UserError, first_line
from data_prep.common.files import file_hash
from data_prep.common.records import TokenizerRecord
from data_prep.common.schema import read_json
from data_prep.tokenization.byte_level import byte_level_ranks, chunks, merges, printable, unprintable

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT = "<|endoftext|>"
# What transformers' `save_pretrained` writes of a tokenizer.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
          "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "chat_template.jinja")  # fmt: skip
# Longer documents are encoded in chunks, each of which takes about 100 bytes of memory a character at worst.
_CHUNK_CHARACTERS = 1 << 20
_MOST_IDS = 1 << 24  # no published vocabulary has a tenth of that


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

        vocab = {printable(token): rank for token, rank in self.ranks.items()}
        pairs = [(printable(left), printable(right)) for left, right in merges(self.ranks)]
        backend = Backend(models.BPE(vocab=vocab, merges=pairs))
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


def describe_tokenizer(tokenizer: Tokenizer, sha256: str) -> TokenizerRecord:
    """What the manifest says of a tokenizer, given the hash of its `tokenizer.json`."""
    return TokenizerRecord(tokenizer.name, tokenizer.vocab_size, tokenizer.eos_token_id, sha256)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer folder that belong to a tokenizer, by their names; whatever else lies there is not."""
    return [folder / name for name in _FILES if (folder / name).is_file()]


def tokenizer_hash(folder: Path) -> str:
    """sha256 of a tokenizer folder's `tokenizer.json`: two folders of one hash give the same ids."""
    return file_hash(Path(folder) / "tokenizer.json")


def tokenizer_problem(tokenizer: Any, record: TokenizerRecord) -> str | None:
    """How what `hf_tokenizer` gives differs from what a manifest says of it; None if it does not."""
    found = {"eos_token_id": tokenizer.eos_token_id, "vocab_size": max(tokenizer.get_vocab().values()) + 1}
    wrong = [
        f"{name}={value}, not {getattr(record, name)}"
        for name, value in found.items()
        if value != getattr(record, name)
    ]
    return f"the tokenizer is another one than the manifest says ({'; '.join(wrong)})" if wrong else None


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


def hf_tokenizer(source: str | Path) -> Any:
    """What `AutoTokenizer` loads from a folder or the Hub; code that lies there is never run.

    Raises:
        UserError: where there is none, or one that is nothing without such code.
    """
    from transformers import AutoTokenizer

    file = Path(source) / "tokenizer.json"
    if file.is_file():
        _check_ids(file)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # files of anybody's: the libraries that read them raise whatever comes up
        raise UserError(f"tokenizer {str(source)!r}: {first_line(error)}") from error


def _check_ids(file: Path) -> None:
    """Refuse ids that no vocabulary has (`UserError`): the libraries make tables as long as the largest one."""
    content = read_json(file, dict[str, Any])
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    for number in ids:
        if type(number) is not int or not 0 <= number < _MOST_IDS:
            raise UserError(f"{file}: {number!r} is not the id of a token, a whole number from 0 to {_MOST_IDS - 1:,}")


def load_tokenizer(source: str | Path, name: str | None = None) -> Tokenizer:
    """The tokenizer that `AutoTokenizer` loads from a folder or the Hub, with the same id for every text.

    Raises:
        UserError: where there is none, one without an end of text, or one that the `tokenizers` library does not run.
    """
    tokenizer = hf_tokenizer(source)
    name = name or str(source)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no end-of-text token (eos_token), which every document begins with")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer {name!r} has no tokenizer.json; only those run by the tokenizers library are read")
    ranks = byte_level_ranks(json.loads(backend.to_str()), tokenizer.eos_token_id)
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
    ranks = {unprintable(token): rank for token, rank in backend.get_vocab().items()}
    return ByteLevelTokenizer(f"bpe-{vocab_size}", ranks, vocab_size - 1)

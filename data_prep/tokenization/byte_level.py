"""Byte-level BPE as in GPT-2: token spelling, merges, and token lengths in bytes."""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

_CHUNK_END = re.compile(r"\S(?=[ \n])")


def _byte_to_character() -> dict[int, str]:
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = (byte for byte in range(256) if byte not in visible)
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


# GPT-2's spelling of bytes: Latin-1 for visible characters, and characters from 256 on for the others.
_BYTE_TO_CHARACTER = _byte_to_character()
_CHARACTER_TO_BYTE = {character: byte for byte, character in _BYTE_TO_CHARACTER.items()}


def bytes_to_unicode(token: bytes) -> str:
    """Spells a token as in GPT-2's vocabulary."""
    return "".join(map(_BYTE_TO_CHARACTER.__getitem__, token))


def unicode_to_bytes(token: str) -> bytes:
    """Returns the bytes of a token spelled as in GPT-2's vocabulary."""
    return bytes(map(_CHARACTER_TO_BYTE.__getitem__, token))


def chunks(text: str, size: int) -> Iterator[str]:
    """Splits a text into chunks of at most `size` characters at positions where GPT-2 also splits it into words.

    That split never joins a space or a line's end to a preceding character that is not white space, so a chunk may end
    there. A chunk without such a position is cut at `size`: that many characters in a row are no words.
    """
    start = 0
    while len(text) - start > size:
        stop = start + size
        for lookback in (4096, size):
            ends = [match.end() for match in _CHUNK_END.finditer(text, max(start, stop - lookback), stop + 1)]
            if ends:
                stop = ends[-1]
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def ends_a_word(text: str, stop: int) -> bool:
    """Whether GPT-2 splits a text into words at position `stop`, so that a chunk may end there."""
    return stop == len(text) or _CHUNK_END.match(text, stop - 1) is not None


def merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Merge pairs in order of rank, recovered by tokenizing each token with the ranks below its own."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        pairs = [ranks.get(token[i : i + 2], rank) for i in range(len(token) - 1)]
        while len(parts) > 2:
            best = pairs.index(min(pairs))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
            del pairs[best]
            for changed in range(max(0, best - 1), min(best + 1, len(pairs))):
                pairs[changed] = ranks.get(parts[changed] + parts[changed + 1], rank)
        yield parts[0], parts[1]


def byte_level_ranks(state: dict[str, Any], eos_token_id: int) -> dict[bytes, int] | None:
    """Ranks with which tiktoken reproduces a `tokenizers` tokenizer's ids; None if it cannot."""
    model, split = state["model"], state["pre_tokenizer"] or {}
    supported = (
        _keeps_bytes(state)
        and split["type"] == "ByteLevel"
        and split.get("use_regex", True)
        and not any(model.get(name) for name in ("dropout", "byte_fallback", "ignore_merges"))
        and [token["id"] for token in state["added_tokens"]] == [eos_token_id]
    )
    if not supported:
        return None
    words = {token: number for token, number in model["vocab"].items() if number != eos_token_id}
    if set(words.values()) != set(range(eos_token_id)) or not set("".join(words)) <= _CHARACTER_TO_BYTE.keys():
        return None
    ranks = {unicode_to_bytes(token): number for token, number in words.items()}
    found = [(unicode_to_bytes(left), unicode_to_bytes(right)) for left, right in model["merges"]]
    return ranks if found == list(merges(ranks)) else None


def bytes_of_tokens(tokenizer: Any) -> np.ndarray | None:
    """Bytes of text per id of a `transformers` tokenizer, `[V]` int64; 0 for special tokens.

    None unless the tokens of a text are its bytes, each once. WordPiece, SentencePiece, `</w>`, a space before the text
    and normalization add, remove or change some, so that only the source tells the size of a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not _keeps_bytes(json.loads(backend.to_str())):
        return None
    vocab, added, special = tokenizer.get_vocab(), tokenizer.get_added_vocab(), set(tokenizer.all_special_ids)
    counts = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    for token, number in vocab.items():
        if number not in special:
            counts[number] = len(token.encode("utf-8") if token in added else token)
    return counts


def _keeps_bytes(state: dict[str, Any]) -> bool:
    """Whether a `tokenizers` tokenizer's tokens spell exactly the bytes of the text."""
    model, split = state["model"], state["pre_tokenizer"] or {"type": None}
    steps = split.get("pretokenizers", [split])
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        and _CHARACTER_TO_BYTE.keys() <= model["vocab"].keys()
        and state["normalizer"] is None
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(step["type"] in ("ByteLevel", "Split", "Digits", "Punctuation") for step in steps)
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
        and not any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"] if not token["special"])
    )

"""gigatoken (Rød 2026), a faster engine for byte-level BPE; samples of its output are compared with tiktoken's."""

import itertools
import re
import sys
import threading
from importlib import metadata
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.tokenization.byte_level import chunks, ends_a_word
from data_prep.tokenization.tokenizer import CHUNK_CHARACTERS, END_OF_TEXT, ByteLevelTokenizer, Tokenizer

if TYPE_CHECKING:
    from gigatoken.gigatoken_rs import BPETokenizer

Engine: TypeAlias = Literal["auto", "tiktoken", "gigatoken"]
TESTED = ("0.10.0",)
_INSTALL = 'install it with pip install -e ".[fast]" -c constraints.txt, or give --engine tiktoken'
# The letters and numbers of Unicode 17, which tiktoken's tables have and gigatoken's have not: the words around them
# are split otherwise. tests/data_prep/tokenization/test_gigatoken.py finds them among all characters.
_UNKNOWN_TO_GIGATOKEN = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1\U00010940-\U00010959\U00010ec5-\U00010ec7\U00011db0-\U00011ddb"
    "\U00011de0-\U00011de9\U00016ea0-\U00016eb8\U00016ebb-\U00016ed3\U00016ff2-\U00016ff6\U000187f8-\U000187ff"
    "\U00018d09-\U00018d1e\U00018d80-\U00018df2\U0001e6c0-\U0001e6de\U0001e6e0-\U0001e6e2\U0001e6e4\U0001e6e5"
    "\U0001e6e7-\U0001e6ed\U0001e6f0-\U0001e6f4\U0001e6fe\U0001e6ff\U0002b73a-\U0002b73f\U0002cea2-\U0002cead"
    "\U000323b0-\U00033479]"
)
# Their first bytes in UTF-8, and their first two.
_FIRST_BYTES = {
    b"\xe0": (b"\xe0\xa2", b"\xe0\xb1", b"\xe0\xb3"),
    b"\xea": (b"\xea\x9f",),
    b"\xf0": tuple(b"\xf0" + second.to_bytes() for second in b"\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3"),
}
_END_OF_TEXT = END_OF_TEXT.encode()
_SAMPLE_CHARACTERS = 1024  # of each call, which has about a million
_INSTANCE_CHARACTERS = 1 << 28  # then a new instance, as its cache of words only grows


class GigatokenTokenizer:
    """A byte-level tokenizer that gigatoken runs, with tiktoken's ids."""

    def __init__(self, reference: ByteLevelTokenizer) -> None:
        from gigatoken.gigatoken_rs import PadTruncate

        self.name, self.vocab_size, self.eos_token_id = reference.name, reference.vocab_size, reference.eos_token_id
        self.reference = reference
        self.save, self.decode = reference.save, reference.decode
        self._json = reference.backend.to_str()
        self._options = PadTruncate(pad_id=self.eos_token_id)
        self._local = threading.local()

    def encode(self, texts: list[str]) -> np.ndarray:
        """As in `Tokenizer`.

        Raises:
            UserError: if the ids of a sample are not those of tiktoken; it names the document.
        """
        encoded = [text.encode("utf-8") for text in texts]
        known = list(map(_is_known, texts, encoded))
        pieces = [np.empty(0, dtype=np.uint32)]
        for is_known, numbers in itertools.groupby(range(len(texts)), key=lambda number: known[number]):
            first, *others = numbers
            run = slice(first, first + 1 + len(others))
            pieces.append(self._encode(texts[run], encoded[run]) if is_known else self.reference.encode(texts[run]))
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

    def _encode(self, texts: list[str], encoded: list[bytes]) -> np.ndarray:
        # One row without padding, in which gigatoken takes the end of text between documents for the special token. Its
        # other calls hold the interpreter's lock, or return another library's array, which takes milliseconds to make.
        joined = _END_OF_TEXT + _END_OF_TEXT.join(encoded)
        ids = self._instance(len(joined)).encode_batch_padded([joined], self._options, parallel=False)[0][0]
        starts = np.flatnonzero(ids == self.eos_token_id)
        if len(starts) != len(texts):
            raise UserError(f"{_difference(texts[0])}: {len(starts)} ends of text for {len(texts)} documents")
        self._local.calls = number = getattr(self._local, "calls", -1) + 1
        number %= len(texts)
        stop = starts[number + 1] if number + 1 < len(texts) else len(ids)
        self._compare(texts[number], ids[starts[number] + 1 : stop])
        return ids

    def _instance(self, characters: int) -> "BPETokenizer":
        """This thread's instance, replaced after some hundred million characters."""
        from gigatoken.gigatoken_rs import load_hf_json

        if getattr(self._local, "left", 0) <= 0:
            self._local.instance, self._local.left = load_hf_json(self._json), _INSTANCE_CHARACTERS
        self._local.left -= characters
        return self._local.instance

    def _compare(self, text: str, found: np.ndarray) -> None:
        """Checks the ids of a document's beginning against tiktoken's (`UserError`)."""
        beginning = next(chunks(text, _SAMPLE_CHARACTERS))
        if not ends_a_word(text, len(beginning)):
            beginning = next(chunks(text, CHUNK_CHARACTERS))
        expected = self.reference.encode([beginning])[1:]
        if not np.array_equal(found[: len(expected)], expected) or (beginning == text and len(found) != len(expected)):
            raise UserError(_difference(text))


def _difference(text: str) -> str:
    return (
        f"gigatoken {_version()} gives other ids than tiktoken for the document that begins with {text[:60]!r}; "
        "give --engine tiktoken"
    )


def _is_known(text: str, encoded: bytes) -> bool:
    """Whether gigatoken splits a text exactly as tiktoken does."""
    if _END_OF_TEXT in encoded:  # is text there, not the special token
        return False
    if len(text) > CHUNK_CHARACTERS:
        stops = itertools.accumulate(map(len, chunks(text, CHUNK_CHARACTERS)))
        if not all(ends_a_word(text, stop) for stop in stops):
            return False
    if text.isascii():
        return True
    # Bytes are found many times faster than the ranges, which most texts do not need.
    near = any(first in encoded and any(pair in encoded for pair in pairs) for first, pairs in _FIRST_BYTES.items())
    return not (near and _UNKNOWN_TO_GIGATOKEN.search(text))


def with_engine(tokenizer: Tokenizer, engine: Engine) -> Tokenizer:
    """Returns the tokenizer run by `engine`; `auto` uses gigatoken if a tested version is installed and supports the
    tokenizer.

    Raises:
        UserError: if gigatoken is asked for and cannot be used.
    """
    if engine == "tiktoken":
        return tokenizer
    problem, version = None, _version()
    if version is None:
        problem = f"gigatoken is not installed; {_INSTALL}"
    elif not isinstance(tokenizer, ByteLevelTokenizer):
        problem = f"gigatoken runs byte-level BPE as GPT-2's only, not {tokenizer.name!r}; give --engine auto"
    elif version not in TESTED:
        problem = f"gigatoken {version} has not been tested, {TESTED[-1]} has; {_INSTALL}"
    if problem is None:
        return GigatokenTokenizer(tokenizer)  # type: ignore[arg-type]
    if engine == "gigatoken":
        raise UserError(problem)
    if version is not None and version not in TESTED:
        print(f"{problem}; tiktoken is used", file=sys.stderr)
    return tokenizer


def _version() -> str | None:
    try:
        return metadata.version("gigatoken")
    except metadata.PackageNotFoundError:
        return None

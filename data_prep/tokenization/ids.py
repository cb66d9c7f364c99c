"""Documents that are token ids already, as in published token sets."""

from collections import Counter

import numpy as np

from data_prep.common.command_line import UserError
from data_prep.tokenization.tokenizer import Tokenizer

_SAMPLE_IDS = 1024  # of each call
_SHARE_THAT_RETURNS = 0.9  # of a sample, decoded and encoded again; words cut at its ends may not


class TokenIds:
    """Takes ids as they are, and checks that they are those of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name, self.vocab_size, self.eos_token_id = tokenizer.name, tokenizer.vocab_size, tokenizer.eos_token_id
        self.tokenizer = tokenizer

    def encode(self, documents: list[np.ndarray], /) -> np.ndarray:
        """The ids of documents, concatenated, each after one end of text, its own if it begins or ends with one.

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
        """Refuses ids whose text the tokenizer encodes as others (`UserError`)."""
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

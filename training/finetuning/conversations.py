"""Conversations to learn from: read, checked, and fitted to the model's context."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.common.command_line import UserError
from data_prep.reading.docstrings import Conversation, docstring_conversations
from data_prep.reading.sources import BUILTIN, ConversationSource
from eval.common.chat import special_token_in
from training.finetuning.template import render


def read_conversations(source: ConversationSource) -> Iterator[Conversation]:
    """The conversations of a source (`UserError`, which names the record, for one that is not valid)."""
    if source.source != BUILTIN:
        return source.resolve().documents()
    if source != ConversationSource(BUILTIN, text_column=source.text_column):
        raise UserError("the built-in conversations have no --name, --split or --revision; leave them out")
    return iter(docstring_conversations())


@dataclass
class Fitted:
    """Conversations of at most `max_length` tokens.

    Attributes:
        shortened: number of longer conversations that keep their first turns.
        left_out: number of conversations whose first answer does not fit.
        first: the first longer conversation's number, from 1, and its number of tokens.
    """

    conversations: list[Conversation] = field(default_factory=list)
    shortened: int = 0
    left_out: int = 0
    first: tuple[int, int] | None = None

    def describe(self, max_length: int) -> str | None:
        """A line about longer conversations, None without any."""
        if self.first is None:
            return None
        total, (number, tokens) = len(self.conversations) + self.left_out, self.first
        return (
            f"{self.shortened + self.left_out:,} of {total:,} conversations are longer than {max_length:,} tokens, the "
            f"first is number {number:,} with {tokens:,}: {self.shortened:,} keep the turns that fit, "
            f"{self.left_out:,} are left out"
        )


def fit(conversations: Iterable[Conversation], tokenizer: Any, max_length: int, limit: int | None) -> Fitted:
    """Fits the first `limit` conversations, or all, to `max_length` tokens by leaving out turns at their end.

    Raises:
        UserError: for text that contains a special token of the tokenizer, and if no conversation fits.
    """
    fitted = Fitted()
    for number, messages in enumerate(conversations, start=1):
        for message in messages:
            if token := special_token_in(tokenizer, message["content"]):
                raise UserError(f"conversation {number:,} contains {token!r}, a special token; remove it there")
        length = len(render(tokenizer, messages).ids)
        if length > max_length:
            fitted.first = fitted.first or (number, length)
            messages = _turns_that_fit(messages, tokenizer, max_length)
            fitted.shortened, fitted.left_out = fitted.shortened + bool(messages), fitted.left_out + (not messages)
        if messages:
            fitted.conversations.append(messages)
        if number == limit:
            break
    if fitted.left_out == 0 and not fitted.conversations:
        raise UserError("there are no conversations in the data; name others")
    if not fitted.conversations:
        remedy = "give data with shorter ones, or a model with a longer context"
        raise UserError(f"no conversation fits into {max_length:,} tokens; {remedy}")
    return fitted


def _turns_that_fit(messages: Conversation, tokenizer: Any, max_length: int) -> Conversation:
    """The most first messages that end with an answer and fit; empty if there are none."""
    for stop in range(len(messages) - 1, 0, -1):
        if messages[stop - 1]["role"] == "assistant" and len(render(tokenizer, messages[:stop]).ids) <= max_length:
            return messages[:stop]
    return []


def split(conversations: list[Conversation], held_out: int, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to learn from, and `held_out` others to measure on, chosen at random (`UserError` if there are too
    few)."""
    if len(conversations) <= held_out:
        raise UserError(
            f"max_eval_samples={held_out} leaves none of the {len(conversations)} conversations to learn from; give "
            f"fewer, or more data"
        )
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    return shuffled[held_out:], shuffled[:held_out]

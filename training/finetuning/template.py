"""The chat template of a model: its special tokens, and which tokens are learned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError
from modeling import GPTModel

# ChatML's marks of a turn.
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def add_chat_template(model: GPTModel, tokenizer: Any) -> list[int]:
    """Gives a base model ChatML's tokens, grown embeddings and a chat template, in place. A chat model keeps its own.

    Returns:
        The ids of the new tokens.

    Raises:
        UserError: for a tokenizer without end of text, and a chat template that does not mark what is learned.
    """
    if tokenizer.chat_template is not None:
        if "generation" not in tokenizer.chat_template:
            raise UserError("the model's chat template has no {% generation %} marks, which tell what is learned")
        return []
    if tokenizer.eos_token is None:
        raise UserError("the model's tokenizer has no end-of-text token (eos_token), which conversations begin with")
    from tokenizers import AddedToken
    from transformers.utils import logging

    end_of_text = tokenizer.eos_token_id
    tokenizer.bos_token = tokenizer.eos_token
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (TURN_START, TURN_END)]
    before = set(tokenizer.get_vocab())
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.eos_token = tokenizer.pad_token = TURN_END
    tokenizer.chat_template = _TEMPLATE.read_text(encoding="utf-8").rstrip()
    new = [tokenizer.convert_tokens_to_ids(str(mark)) for mark in marks if str(mark) not in before]

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers explains at length how it chooses the new rows
    size = max(model.config.vocab_size, *(number + 1 for number in tokenizer.get_vocab().values()))
    model.resize_token_embeddings(size)
    logging.set_verbosity(level)
    turn_end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.pad_token_id = end_of_text, turn_end
    model.config.eos_token_id = turn_end
    model.generation_config.eos_token_id = [turn_end, end_of_text]
    return new


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    Attributes:
        ids: its tokens.
        learned: of each token, whether the loss includes it.
    """

    ids: list[int]
    learned: list[bool]


def render(tokenizer: Any, messages: list[dict[str, str]]) -> Rendered:
    """Applies the chat template to a whole conversation."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return Rendered(found["input_ids"], list(map(bool, found["assistant_masks"])))


def show(tokenizer: Any, rendered: Rendered, color: bool) -> str:
    """The text of each token; learned tokens are green with `color`, else in brackets."""
    learned = "\033[30;42m{}\033[0m" if color else "[{}]"
    pieces = map(tokenizer.decode, rendered.ids)
    return "".join(
        learned.format(piece) if is_learned else piece
        for piece, is_learned in zip(pieces, rendered.learned, strict=True)
    )

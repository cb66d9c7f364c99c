"""The chat template of a model: its special tokens, and which tokens are learned."""

from pathlib import Path
from typing import Any

from data_prep.common.command_line import UserError

# ChatML's marks of a turn.
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def add_chat_template(model: Any, tokenizer: Any) -> None:
    """Gives a base model ChatML's tokens, grown embeddings and a chat template, in place. A chat model keeps its own.

    Raises:
        UserError: for a tokenizer without end of text, and a chat template that does not mark what is learned.
    """
    if tokenizer.chat_template is not None:
        if "generation" not in tokenizer.chat_template:
            raise UserError("the model's chat template has no {% generation %} marks, which tell what is learned")
        return
    if tokenizer.eos_token is None:
        raise UserError("the model's tokenizer has no end-of-text token (eos_token), which conversations begin with")
    from tokenizers import AddedToken
    from transformers.utils import logging

    end_of_text = tokenizer.eos_token_id
    tokenizer.bos_token = tokenizer.eos_token
    marks = [AddedToken(mark, special=True, normalized=False) for mark in (TURN_START, TURN_END)]
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.eos_token = tokenizer.pad_token = TURN_END
    tokenizer.chat_template = _TEMPLATE.read_text(encoding="utf-8").rstrip()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers explains at length how it chooses the new rows
    model.resize_token_embeddings(max(model.config.vocab_size, 1 + max(tokenizer.get_vocab().values())))
    logging.set_verbosity(level)
    turn_end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.pad_token_id = end_of_text, turn_end
    model.config.eos_token_id = turn_end
    model.generation_config.eos_token_id = [turn_end, end_of_text]


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[tuple[int, bool]]:
    """The tokens of a conversation, each with whether the loss includes it."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return [(token, bool(learned)) for token, learned in zip(found["input_ids"], found["assistant_masks"], strict=True)]


def show(tokenizer: Any, rendered: list[tuple[int, bool]], color: bool) -> str:
    """The text of each token; learned tokens are green with `color`, else in brackets."""
    marked = "\033[30;42m{}\033[0m" if color else "[{}]"
    return "".join((marked if learned else "{}").format(tokenizer.decode(token)) for token, learned in rendered)

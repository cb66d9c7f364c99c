"""A conversation with a chat model."""

from typing import Any

from data_prep.common.command_line import UserError
from eval.common.generation import Generated, Sampling, generate_ids, prompt_room
from modeling import GPTModel


def check_chat_model(name: str, tokenizer: Any) -> None:
    """Raises `UserError` for a model without a chat template."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"model {name!r} has no chat template, so it is no chat model; python -m training.chat makes one"
        )


def special_token_in(tokenizer: Any, text: str) -> str | None:
    """A special token that the text spells out, and that the tokenizer would read as such, or None."""
    return next((t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content in text), None)


def answer(
    model: GPTModel,
    tokenizer: Any,
    history: list[dict[str, str]],
    sampling: Sampling,
    *,
    compiled: bool = False,
    streamer: Any = None,
) -> Generated:
    """Answers the last message of `history`, which is the user's, and appends the answer.

    Where the conversation is longer than the context, its oldest messages are removed from `history`, but not the
    system's. `Generated.left_out` is their number. The rest as in `generate`.

    Raises:
        UserError: for a message that contains a special token, and one that does not fit by itself.
    """
    if token := special_token_in(tokenizer, history[-1]["content"]):
        raise UserError(f"the message contains {token!r}, a special token of the model; leave it out")
    room, left_out = prompt_room(model, sampling), 0
    first = 1 if history[0]["role"] == "system" else 0
    while len(ids := _prompt(tokenizer, history)) > room:
        if len(history) == first + 1:
            raise UserError(
                f"the message has {len(ids)} tokens with its marks, and there is room for {room}; shorten it"
            )
        stop = next(n for n in range(first + 1, len(history)) if history[n]["role"] == "user")
        del history[first:stop]
        left_out += stop - first
    texts, new_tokens = generate_ids(model, tokenizer, ids, sampling, compiled=compiled, streamer=streamer)
    history.append({"role": "assistant", "content": texts[0]})
    return Generated(texts, new_tokens, left_out)


def _prompt(tokenizer: Any, history: list[dict[str, str]]) -> list[int]:
    return tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=True)["input_ids"]

"""Continue prompts with a trained model, or talk to a chat model.

python -m eval.generate runs/quickstart/checkpoints/step_00001000 --prompt "def main("
python -m eval.generate runs/quickstart/checkpoints/step_00001000
python -m eval.generate runs/quickstart-chat --chat
"""

import sys
import time
from typing import Any

from data_prep.common.command_line import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

from data_prep.common.command_line import ArgumentParser, UserError, run
from eval.common.chat import answer, check_chat_model
from eval.common.generation import Generated, Sampling, generate
from eval.common.models import load_model
from modeling import GPTModel


def _read_prompt() -> str | None:
    """Returns a line of the standard input, None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _print_continuations(model: GPTModel, tokenizer: Any, prompt: str, sampling: Sampling, compiled: bool) -> None:
    """Prints continuations of a prompt, a single one token by token; speed and truncation go to stderr."""
    streamer = None
    if sampling.num_return_sequences == 1:
        print(prompt, end="", flush=True)
        streamer = _streamer(tokenizer)
    started = time.perf_counter()
    result = generate(model, tokenizer, prompt, sampling, compiled=compiled, streamer=streamer)
    for number, text in enumerate(result.texts if streamer is None else [], start=1):
        print(f"--- {number}\n{prompt}{text}")
    _print_speed(result, started, f"the prompt's first {result.left_out:,} tokens had no room")


def _print_answer(
    model: GPTModel, tokenizer: Any, history: list[dict[str, str]], sampling: Sampling, compiled: bool
) -> None:
    """Prints the answer to the last message of `history` token by token; the rest as `_print_continuations`."""
    started = time.perf_counter()
    result = answer(model, tokenizer, history, sampling, compiled=compiled, streamer=_streamer(tokenizer))
    context = model.config.n_positions
    _print_speed(
        result, started, f"the {result.left_out} oldest messages no longer fit the context of {context:,} tokens"
    )


def _print_speed(result: Generated, started: float, cut: str) -> None:
    seconds = time.perf_counter() - started
    more = f"; {cut}" if result.left_out else ""
    print(f"[{result.new_tokens:,} tokens, {result.new_tokens / seconds:,.0f} a second{more}]", file=sys.stderr)


def _chat(model: GPTModel, tokenizer: Any, sampling: Sampling, compiled: bool) -> None:
    """Answers each line of the standard input."""
    history: list[dict[str, str]] = []
    for text in iter(_read_prompt, None):
        if not text.strip():
            continue
        history.append({"role": "user", "content": text})
        try:
            _print_answer(model, tokenizer, history, sampling, compiled)
        except UserError as error:  # of this message: the conversation goes on without it
            history.pop()
            print(f"error: {error}", file=sys.stderr)


def main() -> None:
    parser = ArgumentParser("python -m eval.generate", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("prompt", help="text to continue; by default each line of the standard input")
    parser.add_option(
        "chat", action="store_true", help="answer as a chat model; lines are messages of one conversation"
    )
    parser.add_option("max_new_tokens", type=int, default=200, help="tokens to generate at most")
    parser.add_option("temperature", type=float, default=0.8, help="divides the logits; 0 is greedy")
    parser.add_option("top_k", type=int, default=50, help="sample from the N most likely tokens; 0 for all")
    parser.add_option("top_p", type=float, default=1.0, help="sample from the most likely tokens of this probability")
    parser.add_option("num_return_sequences", type=int, default=1, help="continuations of a prompt")
    parser.add_option("seed", type=int, default=0, help="of the random numbers")
    parser.add_option("compile", action="store_true", help="compile the model: slow to start, then faster")
    settings = vars(parser.parse_args())
    name, prompt, chat, compiled = (settings.pop(option) for option in ("model", "prompt", "chat", "compile"))
    sampling = Sampling(**settings)
    if min(sampling.temperature, sampling.top_k, sampling.max_new_tokens - 1, sampling.num_return_sequences - 1) < 0:
        raise UserError("temperature and top_k must be at least 0, max_new_tokens and num_return_sequences at least 1")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p={sampling.top_p} must be greater than 0 and at most 1")
    if chat and sampling.num_return_sequences > 1:
        raise UserError("a chat has one answer to a message; leave out --num_return_sequences")
    if chat and prompt is not None and not prompt.strip():
        raise UserError("the message of --prompt is empty; write one, or leave it out to type messages")
    model, tokenizer = load_model(name)
    if chat:
        check_chat_model(name, tokenizer)
        if prompt is None:
            _chat(model, tokenizer, sampling, compiled)
        else:
            _print_answer(model, tokenizer, [{"role": "user", "content": prompt}], sampling, compiled)
        return
    for text in iter(_read_prompt, None) if prompt is None else [prompt]:
        _print_continuations(model, tokenizer, text, sampling, compiled)


if __name__ == "__main__":
    run(main)

"""Continue prompts with a trained model.

python -m eval.generate runs/quickstart/checkpoints/step_00001000 --prompt "def main("
python -m eval.generate runs/quickstart/checkpoints/step_00001000
"""

import sys
import time
from typing import TYPE_CHECKING, Any

from data_prep.common.command_line import ArgumentParser, UserError, run

if TYPE_CHECKING:
    from eval.common.generation import Sampling
    from modeling import GPTModel


def _read_prompt() -> str | None:
    """Reads a line from standard input; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _print_continuations(model: "GPTModel", tokenizer: Any, prompt: str, sampling: "Sampling", compiled: bool) -> None:
    """Prints continuations of a prompt, a single one token by token; speed and truncation go to stderr."""
    from transformers import TextStreamer

    from eval.common.generation import generate

    streamer = None
    if sampling.num_return_sequences == 1:
        print(prompt, end="", flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    result = generate(model, tokenizer, prompt, sampling, compiled=compiled, streamer=streamer)
    for number, text in enumerate(result.texts if streamer is None else [], start=1):
        print(f"--- {number}\n{prompt}{text}")
    seconds = time.perf_counter() - started
    more = f"; the prompt's first {result.left_out:,} tokens had no room" if result.left_out else ""
    print(f"[{result.new_tokens:,} tokens, {result.new_tokens / seconds:,.0f} a second{more}]", file=sys.stderr)


def main() -> None:
    parser = ArgumentParser("python -m eval.generate", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("prompt", help="text to continue; by default each line of the standard input")
    parser.add_option("max_new_tokens", type=int, default=200, help="tokens to generate at most")
    parser.add_option("temperature", type=float, default=0.8, help="divides the logits; 0 is greedy")
    parser.add_option("top_k", type=int, default=50, help="sample from the N most likely tokens; 0 for all")
    parser.add_option("top_p", type=float, default=1.0, help="sample from the most likely tokens of this probability")
    parser.add_option("num_return_sequences", type=int, default=1, help="continuations of a prompt")
    parser.add_option("seed", type=int, default=0, help="of the random numbers")
    parser.add_option("compile", action="store_true", help="compile the model: slow to start, then faster")
    args = parser.parse_args()
    if min(args.temperature, args.top_k, args.max_new_tokens - 1, args.num_return_sequences - 1) < 0:
        raise UserError("temperature and top_k must be at least 0, max_new_tokens and num_return_sequences at least 1")
    if not 0 < args.top_p <= 1:
        raise UserError(f"top_p={args.top_p} must be greater than 0 and at most 1")

    from eval.common.generation import Sampling
    from eval.common.models import load_model

    sampling = Sampling(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.num_return_sequences, args.seed
    )
    model, tokenizer = load_model(args.model)
    for text in iter(_read_prompt, None) if args.prompt is None else [args.prompt]:
        _print_continuations(model, tokenizer, text, sampling, args.compile)


if __name__ == "__main__":
    run(main)

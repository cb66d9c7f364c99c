"""Continue texts with a trained model, one given or one after the other.

python -m eval.generate runs/quickstart/checkpoints/step_00000800 --prompt "def main("
python -m eval.generate runs/quickstart/checkpoints/step_00000800
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.common.command_line import ArgumentParser, UserError, run
from eval.common.models import evaluating, load_model
from modeling import CACHE_NAME, GPTModel


@dataclass(frozen=True)
class Sampling:
    """How to continue a text.

    Attributes:
        max_new_tokens: to add at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: the likeliest tokens to sample from; 0 for all.
        top_p: sample from the likeliest tokens that have this probability together.
        num_return_sequences: continuations of one prompt.
        seed: of the generator that is drawn from.
    """

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    num_return_sequences: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """The continuations of a prompt, not the prompt itself.

    Attributes:
        new_tokens: in all of them.
        left_out: tokens of the prompt that had no room.
    """

    texts: list[str]
    new_tokens: int
    left_out: int


@contextmanager
def isolated_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a generator of one's own: seeded inside, and outside as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng knows nothing of MPS
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if state is not None:
                torch.mps.set_rng_state(state)


def generate(
    model: GPTModel, tokenizer: Any, prompt: str, sampling: Sampling, *, compiled: bool = False, streamer: Any = None
) -> Generated:
    """Continue `prompt`, which stands at the start of a document, with random numbers that nothing else shares.

    A long prompt is cut from its left until `max_new_tokens`, or half of the context, fit in behind it; the
    continuation ends where the context does.

    Args:
        compiled: decode with a compiled model and a cache of the whole context, so that every prompt has one shape.
    """
    context = model.config.n_positions
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]]
    kept = ids[-(context - min(sampling.max_new_tokens, context // 2)) :]
    input_ids = torch.tensor([kept], device=model.device)
    with isolated_random_state(sampling.seed, model.device), evaluating(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(sampling.max_new_tokens, context - len(kept)),
            num_return_sequences=sampling.num_return_sequences,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **_choice_of_tokens(sampling),
            **(_static_cache(model) if compiled else {}),
        )
    added = output[:, len(kept) :]
    return Generated(
        texts=tokenizer.batch_decode(added, skip_special_tokens=True),
        new_tokens=int((added != tokenizer.eos_token_id).sum()),
        left_out=len(ids) - len(kept),
    )


def _choice_of_tokens(sampling: Sampling) -> dict[str, Any]:
    if not sampling.temperature:
        if sampling.num_return_sequences > 1:
            raise UserError("temperature=0 always gives the same text; ask for one sequence, or raise it")
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }


def _static_cache(model: GPTModel) -> dict[str, Any]:
    from transformers import CompileConfig, StaticCache

    compile_config = CompileConfig()
    compile_config._compile_all_devices = True  # by default transformers compiles on GPUs only
    cache = StaticCache(config=model.config, max_cache_len=model.config.n_positions)
    return {CACHE_NAME: cache, "compile_config": compile_config}


def _prompts(given: str | None) -> Iterator[str]:
    """The prompt given, or what is typed line by line until the end of the input."""
    if given is not None:
        yield given
        return
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _show(model: GPTModel, tokenizer: Any, prompt: str, sampling: Sampling, compiled: bool) -> None:
    """Print the continuations of a prompt, a single one token by token; what there is to say of it to stderr."""
    from transformers import TextStreamer

    single = sampling.num_return_sequences == 1
    if single:
        print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if single else None
    started = time.perf_counter()
    result = generate(model, tokenizer, prompt, sampling, compiled=compiled, streamer=streamer)
    seconds = time.perf_counter() - started
    for number, text in enumerate([] if single else result.texts, start=1):
        print(f"--- {number}\n{prompt}{text}")
    cut = f"; the prompt's first {result.left_out:,} tokens had no room" if result.left_out else ""
    print(f"[{result.new_tokens:,} tokens, {result.new_tokens / seconds:,.0f} a second{cut}]", file=sys.stderr)


def main() -> None:
    parser = ArgumentParser("python -m eval.generate", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_option("prompt", help="text to continue; typed line by line if not given")
    parser.add_option("max_new_tokens", type=int, default=200, help="tokens to add, fewer if the text ends before")
    parser.add_option("temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_option("top_k", type=int, default=50, help="sample from so many likeliest tokens; 0 for all")
    parser.add_option("top_p", type=float, default=1.0, help="sample from the likeliest of this probability together")
    parser.add_option("num_return_sequences", type=int, default=1, help="continuations of a prompt")
    parser.add_option("seed", type=int, default=0, help="another seed, another text")
    parser.add_option("compile", action="store_true", help="compile the model: slow to start, then quicker")
    args = parser.parse_args()
    if args.temperature < 0 or args.top_k < 0 or args.max_new_tokens < 1 or args.num_return_sequences < 1:
        raise UserError("temperature and top_k must be at least 0, max_new_tokens and num_return_sequences at least 1")
    if not 0 < args.top_p <= 1:
        raise UserError(f"top_p={args.top_p} must be greater than 0 and at most 1")
    model, tokenizer = load_model(args.model)
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_return_sequences=args.num_return_sequences,
        seed=args.seed,
    )
    for prompt in _prompts(args.prompt):
        _show(model, tokenizer, prompt, sampling, args.compile)


if __name__ == "__main__":
    run(main)

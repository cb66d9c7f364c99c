"""Continue prompts with a trained model.

python -m eval.generate runs/quickstart/checkpoints/step_00001000 --prompt "def main("
python -m eval.generate runs/quickstart/checkpoints/step_00001000
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from data_prep.common.openmp import limit_spinning

if __name__ == "__main__":
    limit_spinning()  # before torch is loaded

import torch

from data_prep.common.command_line import ArgumentParser, UserError, run
from eval.common.models import evaluating, load_model
from modeling import CACHE_NAME, GPTModel


@dataclass(frozen=True)
class Sampling:
    """Settings of `generate`, named as in transformers' `GenerationConfig`; `seed` is that of its random numbers."""

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 50  # 0 for all tokens
    top_p: float = 1.0
    num_return_sequences: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Continuations of a prompt, without the prompt; `left_out` counts prompt tokens beyond the model's context."""

    texts: list[str]
    new_tokens: int
    left_out: int


@contextmanager
def isolated_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's random numbers inside; outside they continue as if none had been drawn."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        state = torch.mps.get_rng_state() if device.type == "mps" else None  # fork_rng does not support MPS
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if state is not None:
                torch.mps.set_rng_state(state)


def generate(
    model: GPTModel, tokenizer: Any, prompt: str, sampling: Sampling, *, compiled: bool = False, streamer: Any = None
) -> Generated:
    """Continues `prompt` as the start of a document. The random state outside does not change.

    A long prompt is truncated from the left to leave room for `max_new_tokens`, or for half of the context; the
    continuation ends at the end of the context.

    Args:
        compiled: compiles the model, with a cache of the whole context, so that all prompts have one shape.
    """
    context = model.config.n_positions
    ids = [tokenizer.eos_token_id, *tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]]
    kept = ids[-(context - min(sampling.max_new_tokens, context // 2)) :]
    input_ids = torch.tensor([kept], device=model.device)
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        names = ("temperature", "top_k", "top_p")
        options = {"do_sample": True, **{name: getattr(sampling, name) for name in names}}
    elif sampling.num_return_sequences > 1:
        raise UserError("temperature=0 always gives the same text; ask for one sequence, or raise it")
    with isolated_random_state(sampling.seed, model.device), evaluating(model):
        output: Any = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(sampling.max_new_tokens, context - len(kept)),
            num_return_sequences=sampling.num_return_sequences,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **options,
            **(_static_cache(model) if compiled else {}),
        )
    added = output[:, len(kept) :]
    texts = tokenizer.batch_decode(added, skip_special_tokens=True)
    return Generated(texts, int((added != tokenizer.eos_token_id).sum()), len(ids) - len(kept))


def _static_cache(model: GPTModel) -> dict[str, Any]:
    from transformers import CompileConfig, StaticCache

    compile_config: Any = CompileConfig()
    compile_config._compile_all_devices = True  # by default transformers compiles on GPUs only
    cache = StaticCache(config=model.config, max_cache_len=model.config.n_positions)
    return {CACHE_NAME: cache, "compile_config": compile_config}


def _read_prompt() -> str | None:
    """Returns a line of the standard input, None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _print_continuations(model: GPTModel, tokenizer: Any, prompt: str, sampling: Sampling, compiled: bool) -> None:
    """Prints continuations of a prompt, a single one token by token; speed and truncation go to stderr."""
    from transformers import TextStreamer

    streamer = None
    if sampling.num_return_sequences == 1:
        print(prompt, end="", flush=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    started = time.perf_counter()
    result = generate(model, tokenizer, prompt, sampling, compiled=compiled, streamer=streamer)
    seconds = time.perf_counter() - started
    for number, text in enumerate(result.texts if streamer is None else [], start=1):
        print(f"--- {number}\n{prompt}{text}")
    cut = f"; the prompt's first {result.left_out:,} tokens had no room" if result.left_out else ""
    print(f"[{result.new_tokens:,} tokens, {result.new_tokens / seconds:,.0f} a second{cut}]", file=sys.stderr)


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
    settings = vars(parser.parse_args())
    name, prompt, compiled = (settings.pop(option) for option in ("model", "prompt", "compile"))
    sampling = Sampling(**settings)
    if min(sampling.temperature, sampling.top_k, sampling.max_new_tokens - 1, sampling.num_return_sequences - 1) < 0:
        raise UserError("temperature and top_k must be at least 0, max_new_tokens and num_return_sequences at least 1")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p={sampling.top_p} must be greater than 0 and at most 1")
    model, tokenizer = load_model(name)
    for text in iter(_read_prompt, None) if prompt is None else [prompt]:
        _print_continuations(model, tokenizer, text, sampling, compiled)


if __name__ == "__main__":
    run(main)

"""Text generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from data_prep.common.command_line import UserError
from data_prep.tokenization.tokenizer import encode_document
from eval.common.models import evaluating
from modeling import GPTModel


@dataclass(frozen=True)
class Sampling:
    """Settings of `generate`, named as in transformers' `GenerationConfig`; `seed` seeds its random numbers."""

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0 is greedy
    top_k: int = 50  # 0 for all tokens
    top_p: float = 1.0
    num_return_sequences: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """Continuations without the prompt; `left_out` counts prompt tokens beyond the model's context."""

    texts: list[str]
    new_tokens: int
    left_out: int


@contextmanager
def isolated_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's random numbers inside the block and restores their state afterwards."""
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
    """Continues `prompt` as the start of a document, without changing the caller's random state.

    A long prompt is truncated from the left to leave room for `max_new_tokens`, or for half of the context; the
    continuation ends at the end of the context.

    Args:
        compiled: compiles the model, with a cache of the whole context, so that all prompts have one shape.
    """
    ids = encode_document(tokenizer, prompt)
    kept = ids[-prompt_room(model, sampling) :]
    texts, new_tokens = generate_ids(model, tokenizer, kept, sampling, compiled=compiled, streamer=streamer)
    return Generated(texts, new_tokens, len(ids) - len(kept))


def prompt_room(model: GPTModel, sampling: Sampling) -> int:
    """Maximum number of prompt tokens: the context minus `max_new_tokens`, or at least half of the context."""
    context = model.config.n_positions
    return context - min(sampling.max_new_tokens, context // 2)


def generate_ids(
    model: GPTModel, tokenizer: Any, ids: list[int], sampling: Sampling, *, compiled: bool = False, streamer: Any = None
) -> tuple[list[str], int]:
    """Continues token ids; returns the texts without the prompt and their number of tokens. Otherwise as `generate`."""
    input_ids = torch.tensor([ids], device=model.device)
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
            max_new_tokens=min(sampling.max_new_tokens, model.config.n_positions - len(ids)),
            num_return_sequences=sampling.num_return_sequences,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
            **options,
            **(_static_cache(model) if compiled else {}),
        )
    added = output[:, len(ids) :]
    texts = tokenizer.batch_decode(added, skip_special_tokens=True)
    return texts, int((added != tokenizer.eos_token_id).sum())


def _static_cache(model: GPTModel) -> dict[str, Any]:
    from transformers import CompileConfig, StaticCache

    compile_config: Any = CompileConfig()
    compile_config._compile_all_devices = True  # by default transformers compiles on GPUs only
    cache = StaticCache(config=model.config, max_cache_len=model.config.n_positions)
    return {"cache": cache, "compile_config": compile_config}

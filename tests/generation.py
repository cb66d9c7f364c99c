"""Generation by stock GPT-2, by `GPTModel` and by a loop without any cache: the same tokens three times."""

import warnings

import torch
from transformers import DynamicCache, GPT2LMHeadModel, StaticCache

from modeling import GPTModel

KINDS, SAMPLING = ("dynamic", "static"), (False, True)
LENGTHS = {"whole": (12, 12), "left_padded": (12, 9, 5, 1)}
NEW_TOKENS, CONTEXT = 24, 40


def left_padded(lengths: tuple[int, ...], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths and their mask, `[B, longest]` each."""
    width, generator = max(lengths), torch.Generator().manual_seed(1)
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return torch.randint(1, vocab_size - 1, mask.shape, generator=generator) * mask, mask


def without_cache(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, sample: bool) -> torch.Tensor:
    """Greedy or sampled generation that computes everything again for each token."""
    for _ in range(NEW_TOKENS):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1].float()
        following = torch.multinomial(logits.softmax(dim=-1), 1) if sample else logits.argmax(dim=-1, keepdim=True)
        ids, mask = torch.cat([ids, following], dim=1), torch.cat([mask, torch.ones_like(following)], dim=1)
    return ids


@torch.no_grad()
def three_ways(
    stock: GPT2LMHeadModel, ours: GPTModel, kind: str, sample: bool, lengths: tuple[int, ...]
) -> list[torch.Tensor]:
    """The tokens of each of the three, `[B, longest + NEW_TOKENS]`; a deprecation warning is an error."""
    ids, mask = left_padded(lengths, ours.config.vocab_size)
    texts = []
    for model in (stock, ours):
        cache = (
            DynamicCache(config=model.config)
            if kind == "dynamic"
            else StaticCache(config=model.config, max_cache_len=CONTEXT)
        )
        torch.manual_seed(5)
        options = {"top_k": 0, "max_new_tokens": NEW_TOKENS, "eos_token_id": -1, "pad_token_id": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            texts.append(
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=sample,
                    disable_compile=True,
                    **options,
                    cache=cache,
                )
            )
    torch.manual_seed(5)
    return [*texts, without_cache(ours, ids, mask, sample)]

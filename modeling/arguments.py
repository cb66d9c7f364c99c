"""Keyword arguments of `forward`: those that transformers passes, and the refusal of unknown ones."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.utils.generic import TransformersKwargs, is_flash_attention_requested

_FLASH_ARGUMENTS = frozenset(FlashAttentionKwargs.__annotations__)
_PAGED_ARGUMENTS = frozenset(PagedAttentionArgs.__annotations__)
_FLEX_ARGUMENTS = frozenset({"kernel_options"})  # transformers.integrations.flex_attention.flex_attention_forward
_KERNEL_ARGUMENTS = _FLASH_ARGUMENTS | _PAGED_ARGUMENTS | _FLEX_ARGUMENTS
# Collators of packed sequences (transformers' and TRL's) give their limits in these ways beside `position_ids`.
_PACKED_ARGUMENTS = _FLASH_ARGUMENTS | {"seq_idx"}
# Beside those in its type, transformers' decorators act on these.
_BY_DECORATORS = frozenset({"return_dict", "debug_io", "debug_io_dir", "prune_layers"})
_COMMON_ARGUMENTS = _BY_DECORATORS | TransformersKwargs.__annotations__.keys() - _PACKED_ARGUMENTS


def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    """Returns the names of a method's declared arguments."""
    parameters = inspect.signature(function).parameters
    return frozenset(name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD) - {"self"}


# `generate` hands its own arguments to the model where the decoding method does not declare them: `tokenizer`, which
# only assisted decoding does, comes along with stop strings.
GENERATE_ARGUMENTS = argument_names(GenerationMixin.generate).union(
    *(
        argument_names(getattr(GenerationMixin, name, GenerationMixin.generate))
        for name in GENERATION_MODES_MAPPING.values()
    )
)


def refuse_unknown_arguments(
    model: Any, declared: frozenset[str], cache: Any, given: dict[str, Any], *, packed: bool
) -> None:
    """Raises `TypeError` for any of the `given` arguments that neither the model nor transformers nor the attention
    kernel knows.

    Args:
        declared: names of the arguments that `forward` acts on itself.
        cache: argument of the call. It and the configuration decide which kernel runs.
        packed: `position_ids` separate the sequences that are packed into a row.
    """
    known = _COMMON_ARGUMENTS | _PACKED_ARGUMENTS if packed else _COMMON_ARGUMENTS
    if is_paged(cache):
        known = known | _PAGED_ARGUMENTS
    elif is_flash_attention_requested(model.config):
        known = known | _FLASH_ARGUMENTS
    elif model.config._attn_implementation == "flex_attention":
        known = known | _FLEX_ARGUMENTS
    for name in given:
        if name not in known:
            raise TypeError(_unknown_argument(model, name, declared | known))


def _unknown_argument(model: Any, name: str, known: frozenset[str]) -> str:
    if name in _KERNEL_ARGUMENTS:
        return (
            f"{type(model).__name__}.forward() got {name!r}, which the attention kernel in use "
            f"({model.config._attn_implementation!r}) does not act on; choose a kernel that does, or leave it out"
        )
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it knows {', '.join(sorted(known))}"
    return f"{type(model).__name__}.forward() does not act on {name!r}{hint}"


def is_paged(cache: Any) -> bool:
    """Whether a cache belongs to `generate_batch`, which brings its own attention kernels. Raises `TypeError` if it is
    not a cache."""
    if cache is None or isinstance(cache, Cache):
        return False
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    if isinstance(cache, PagedAttentionCache):
        return True
    raise TypeError(f"cache must be a transformers Cache, this is {type(cache).__name__}")

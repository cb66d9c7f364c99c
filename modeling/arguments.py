"""The arguments of `forward`: the two names of the cache, and the refusal of what the model does not act on."""

import difflib
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import is_flash_attention_requested

# transformers 5.24 renamed `past_key_values` in its arguments, its outputs and its mask functions.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

# Acted on by the decorators of transformers that wrap `forward`.
_BY_DECORATORS = {
    "return_dict",  # can_return_tuple, capture_outputs
    "output_attentions",  # capture_outputs
    "output_hidden_states",  # capture_outputs
    "is_causal",  # merge_with_config_defaults, for the mask and the kernel
    "debug_io",  # merge_with_config_defaults
    "debug_io_dir",  # merge_with_config_defaults
    "prune_layers",  # merge_with_config_defaults
}
# transformers.modeling_flash_attention_utils.FlashAttentionKwargs: where packed sequences begin and end.
_BY_FLASH_KERNELS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
# transformers.integrations.flex_attention.flex_attention_forward.
_BY_FLEX_KERNEL = {"kernel_options"}
# transformers.generation.continuous_batching.input_outputs.PagedAttentionArgs: `generate_batch` always gives all of
# them, and every kernel takes those that it needs. `max_seqlen_*` are the names before 5.22.
_BY_PAGED_KERNELS = _BY_FLASH_KERNELS | {"max_seqlen_q", "max_seqlen_k", "read_index", "write_index", "block_table",
                                         "logits_indices", "logits_processor_args"}  # fmt: skip


def accepts_past_key_values(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let `forward` take its `cache` as `past_key_values` too: with transformers' deprecation warning where it has one,
    in silence before 5.24, whose `generate` knows no other name.

    Raises:
        ValueError: when called with both names.
    """
    if CACHE_NAME == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache", raise_if_both_names=True)(forward)

    @wraps(forward)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            if "cache" in kwargs:
                raise ValueError("cache and past_key_values are two names of one argument; give one of them")
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(self, *args, **kwargs)

    return renamed


def argument_names(forward: Callable[..., Any]) -> frozenset[str]:
    """The names that `forward` declares."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, p in inspect.signature(forward).parameters.items() if p.kind in kinds) - {"self"}


def refuse_unknown_arguments(model: Any, declared: frozenset[str], cache: Any, given: dict[str, Any]) -> None:
    """Check that something acts on each of the `given` arguments that `forward` does not declare.

    Args:
        declared: the names that it does declare.
        cache: that it was called with, which decides with the configuration which kernel runs.

    Raises:
        TypeError: for an argument that the model or the kernel in use does not act on, with the nearest known name.
    """
    known = _BY_DECORATORS
    if is_paged(cache):
        known = known | _BY_PAGED_KERNELS
    elif is_flash_attention_requested(model.config):
        known = known | _BY_FLASH_KERNELS
    elif model.config._attn_implementation == "flex_attention":
        known = known | _BY_FLEX_KERNEL
    for name in given:
        if name not in known:
            raise TypeError(_unknown(model, name, declared | known))


def _unknown(model: Any, name: str, known: frozenset[str]) -> str:
    if name in _BY_PAGED_KERNELS | _BY_FLEX_KERNEL:
        return (
            f"{type(model).__name__}.forward() got {name!r}, which the attention kernel in use "
            f"({model.config._attn_implementation!r}) does not act on; choose a kernel that does, or leave it out"
        )
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it knows {', '.join(sorted(known))}"
    return f"{type(model).__name__}.forward() does not act on {name!r}{hint}"


def is_paged(cache: Any) -> bool:
    """Whether a cache is the one of `generate_batch`, which its own attention kernels read.

    Raises:
        TypeError: for something that is no cache.
    """
    if cache is None or isinstance(cache, Cache):
        return False
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    if isinstance(cache, PagedAttentionCache):
        return True
    raise TypeError(f"cache must be a transformers Cache, this is {type(cache).__name__}")

"""Arguments of `forward`: the two names of the cache, and the refusal of unknown arguments."""

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

# transformers' decorators can_return_tuple, capture_outputs and merge_with_config_defaults act on these.
_BY_DECORATORS = {"return_dict", "output_attentions", "output_hidden_states", "is_causal", "debug_io", "debug_io_dir",
                  "prune_layers"}  # fmt: skip
# transformers.modeling_flash_attention_utils.FlashAttentionKwargs: the limits of packed sequences.
_BY_FLASH_KERNELS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
# Collators of packed sequences (transformers' and TRL's) give their limits in these ways beside `position_ids`.
_BESIDE_POSITIONS = _BY_FLASH_KERNELS | {"seq_idx"}
_BY_FLEX_KERNEL = {"kernel_options"}  # transformers.integrations.flex_attention.flex_attention_forward
# transformers.generation.continuous_batching.input_outputs.PagedAttentionArgs: `generate_batch` always passes all of
# them, and each kernel uses some. `max_seqlen_*` are the names before 5.22.
_BY_PAGED_KERNELS = _BY_FLASH_KERNELS | {"max_seqlen_q", "max_seqlen_k", "read_index", "write_index", "block_table",
                                         "logits_indices", "logits_processor_args"}  # fmt: skip


def accepts_past_key_values(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates `forward` to accept `cache` as `past_key_values` too, which warns from transformers 5.24 on. Calls with
    both names raise `ValueError`."""
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
    """Returns the names of the arguments that `forward` declares."""
    parameters = inspect.signature(forward).parameters
    return frozenset(name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD) - {"self"}


def refuse_unknown_arguments(
    model: Any, declared: frozenset[str], cache: Any, given: dict[str, Any], *, packed: bool
) -> None:
    """Raises `TypeError` for `given` arguments that neither the model nor the attention kernel acts on.

    Args:
        declared: names of the arguments that `forward` declares.
        cache: argument of the call. It and the configuration decide which kernel runs.
        packed: `position_ids` separate the sequences that are packed into a row.
    """
    known = _BY_DECORATORS | _BESIDE_POSITIONS if packed else _BY_DECORATORS
    if is_paged(cache):
        known = known | _BY_PAGED_KERNELS
    elif is_flash_attention_requested(model.config):
        known = known | _BY_FLASH_KERNELS
    elif model.config._attn_implementation == "flex_attention":
        known = known | _BY_FLEX_KERNEL
    for name in given:
        if name not in known:
            raise TypeError(_unknown_argument(model, name, declared | known))


def _unknown_argument(model: Any, name: str, known: frozenset[str]) -> str:
    if name in _BY_PAGED_KERNELS | _BY_FLEX_KERNEL:
        return (
            f"{type(model).__name__}.forward() got {name!r}, which the attention kernel in use "
            f"({model.config._attn_implementation!r}) does not act on; choose a kernel that does, or leave it out"
        )
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it knows {', '.join(sorted(known))}"
    return f"{type(model).__name__}.forward() does not act on {name!r}{hint}"


def is_paged(cache: Any) -> bool:
    """Whether a cache belongs to `generate_batch`, which has attention kernels of its own. `TypeError` for no cache."""
    if cache is None or isinstance(cache, Cache):
        return False
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

    if isinstance(cache, PagedAttentionCache):
        return True
    raise TypeError(f"cache must be a transformers Cache, this is {type(cache).__name__}")

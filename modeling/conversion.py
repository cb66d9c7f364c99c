"""GPT-2's transposed `Conv1D` layout on disk and in every state dict; `nn.Linear` in memory.

A block's matrices are transposed where tensors enter and leave the model: `from_pretrained` (transformers' registry of
conversions), `state_dict` and `load_state_dict` (hooks of each block). So whatever saves a state dict writes HF GPT-2.
"""

import re
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter, WeightRenaming

# Names that torch.compile, DDP, activation checkpointing and FSDP put into those of the parameters that they wrap.
_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class _Keep(ConversionOps):
    """Leaves a tensor as it is: `state_dict` has transposed it."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


class _FromDisk(Transpose):
    @property
    def reverse_op(self) -> ConversionOps:
        return _Keep()


def register_checkpoint_conversion() -> None:
    """Makes transformers transpose the four matrices of a block when it loads a `GPTModel`.

    The registry's key is the class name, so stock GPT-2 is unaffected. FSDP2 changes the class of the model it shards.
    """
    converters: list[WeightConverter | WeightRenaming]
    for name in ("GPTModel", "FSDPGPTModel"):
        converters = [WeightConverter(matrix, matrix, operations=[_FromDisk(0, 1)]) for matrix in _MATRICES]
        register_checkpoint_conversion_mapping(name, converters, overwrite=True)


def convert_state_dicts(block: nn.Module) -> None:
    """Makes `block.state_dict()` have the layout on disk, and `block.load_state_dict()` accept both layouts."""
    block.register_state_dict_post_hook(_to_disk)
    block.register_load_state_dict_pre_hook(_from_disk)


def bare_name(name: str) -> str:
    """Returns the name of a parameter without those of wrappers around the model and its parts."""
    return _WRAPPERS.sub("", name)


def to_disk_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a state dict of a model, or of its parameters by name, in the layout on disk."""
    converted = dict(state_dict)
    for name in state_dict:
        if name.endswith(_MATRICES[0]) and not _is_on_disk(state_dict[name]):
            _transpose(converted, name.removesuffix(_MATRICES[0]))
    return converted


def _to_disk(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    _transpose(state_dict, prefix)


def _from_disk(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    attention = state_dict.get(prefix + _MATRICES[0])
    if attention is None or _is_on_disk(attention):
        _transpose(state_dict, prefix)


def _is_on_disk(attention: Tensor) -> bool:
    """Whether `c_attn.weight`, which is never square, is `[C, 3 C]` as on disk."""
    return attention.shape[0] < attention.shape[-1]


def _transpose(state_dict: dict[str, Tensor], prefix: str) -> None:
    for matrix in _MATRICES:
        if (tensor := state_dict.get(prefix + matrix)) is not None:
            state_dict[prefix + matrix] = tensor.T.contiguous()  # a view could not be broadcast or saved

"""Conversion between memory, `nn.Linear`, and disk, GPT-2's transposed `Conv1D` layout."""

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming

_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def register_checkpoint_conversion() -> None:
    """Makes transformers transpose the four matrices of a block when it loads or saves a `GPTModel`.

    The registry's key is the class name, so stock GPT-2 is unaffected. FSDP2 changes the class of the model it shards.
    """
    converters: list[WeightConverter | WeightRenaming]
    for name in ("GPTModel", "FSDPGPTModel"):
        converters = [WeightConverter(matrix, matrix, operations=[Transpose(0, 1)]) for matrix in _MATRICES]
        register_checkpoint_conversion_mapping(name, converters, overwrite=True)


def to_disk_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns `GPTModel.state_dict()` in the layout of HF GPT-2, as views."""
    return {name: tensor.T if name.endswith(_MATRICES) else tensor for name, tensor in state_dict.items()}

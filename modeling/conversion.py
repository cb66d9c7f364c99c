"""The boundary between memory and disk: `nn.Linear` here, GPT-2's transposed `Conv1D` layout there."""

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def register_checkpoint_conversion() -> None:
    """Tell transformers to transpose the four matrices of a block when a `GPTModel` is loaded or saved.

    The entry is keyed on the class name, so stock GPT-2 in the same process is untouched. FSDP2 gives the model that it
    shards a class of its own.
    """
    for name in ("GPTModel", "FSDPGPTModel"):
        converters = [WeightConverter(matrix, matrix, operations=[Transpose(0, 1)]) for matrix in _MATRICES]
        register_checkpoint_conversion_mapping(name, converters, overwrite=True)


def to_disk_layout(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`GPTModel.state_dict()` as HF GPT-2 stores it; the tensors are views."""
    return {name: tensor.T if name.endswith(_MATRICES) else tensor for name, tensor in state_dict.items()}

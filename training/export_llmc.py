"""Export a GPT-2 to llm.c's checkpoint format (`.bin`). llm.c's own dev/eval/export_hf.py does the reverse.

python -m training.export_llmc runs/mine/checkpoints/step_00019073 gpt2_124M.bin
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.common.command_line import ArgumentParser, run

if TYPE_CHECKING:
    from modeling import GPTModel

# llm.c's train_gpt2.py, `write_model`, and train_gpt2.c, `gpt2_build_from_checkpoint`.
_MAGIC, _HEADER = 20240326, 256  # int32 numbers
_VERSIONS = {"float32": 3, "bfloat16": 5}
_SIZES = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
_PADDED_TO = 128
_OF_A_BLOCK = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
               for kind in ("weight", "bias")]  # fmt: skip


def write_llmc(model: "GPTModel", file: Path, dtype: str = "float32") -> None:
    """Write `model` as llm.c reads it: a header, then all parameters, those of a kind side by side for all layers, the
    vocabulary padded with zeros.

    Args:
        dtype: float32, which loses nothing, or bfloat16.

    Raises:
        UserError: for a model that llm.c's network is not.
    """
    import numpy as np
    import torch

    from eval.common.models import check_plain

    config = model.config
    check_plain(config, "llm.c", n_inner=None if config.n_inner is None else 4 * config.n_embd)
    padding = -config.vocab_size % _PADDED_TO
    header = np.zeros(_HEADER, dtype="<i4")
    sizes = [getattr(config, name) for name in _SIZES]
    header[:8] = [_MAGIC, _VERSIONS[dtype], *sizes, config.vocab_size + padding]
    temporary = file.with_name(f".{file.name}.partial")
    try:
        with open(temporary, "wb") as out:
            out.write(header.tobytes())
            for name in _order(config.n_layer):
                tensor = model.get_parameter(name).detach().cpu()
                if name == "transformer.wte.weight":
                    tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
                elif tensor.ndim == 2 and ".h." in name:  # [out, in] there
                    tensor = tensor.T
                out.write(tensor.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _order(n_layer: int) -> list[str]:
    """Parameters in llm.c's order."""
    blocks = [f"transformer.h.{layer}.{part}" for part in _OF_A_BLOCK for layer in range(n_layer)]
    ends = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    return ["transformer.wte.weight", "transformer.wpe.weight", *blocks, *ends]


def main() -> None:
    parser = ArgumentParser("python -m training.export_llmc", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_argument("file", type=Path, help=".bin file to write")
    parser.add_option("dtype", choices=list(_VERSIONS), default="float32", help="of the weights")
    args = parser.parse_args()

    from eval.common.models import from_pretrained

    write_llmc(from_pretrained(args.model), args.file, args.dtype)
    print(args.file)


if __name__ == "__main__":
    run(main)

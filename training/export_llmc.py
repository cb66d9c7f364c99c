"""Write a GPT-2 as a checkpoint of llm.c (`.bin`), or turn one of those into a Hugging Face GPT-2 folder.

python -m training.export_llmc runs/mine/checkpoints/step_00019073 gpt2_124M.bin
python -m training.export_llmc log124M/model_00019560.bin my_model --tokenizer gpt2
"""

import os
from pathlib import Path
from typing import Any

from data_prep.common.command_line import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import numpy as np
import torch
from torch import Tensor

from data_prep.common.command_line import ArgumentParser, UserError, run
from eval.common.models import check_plain, load_weights
from modeling import GPTConfig, GPTModel, parameter_count
from modeling.import_checkpoint import write_folder

# llm.c's train_gpt2.py, `write_model`, and train_gpt2.c, `gpt2_build_from_checkpoint`.
_MAGIC, _HEADER = 20240326, 256  # int32 numbers
_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
_PADDED_TO = 128
_OF_A_BLOCK = [f"{part}.{kind}" for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
               for kind in ("weight", "bias")]  # fmt: skip


def write_llmc(model: GPTModel, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` as llm.c reads it: a header, then all parameters, those of a kind side by side for all layers, the
    vocabulary padded with zeros.

    Args:
        dtype: float32, which loses nothing, or bfloat16.

    Raises:
        UserError: for a model that llm.c's network is not.
    """
    config = model.config
    check_plain(config, "llm.c", n_inner=None if config.n_inner is None else 4 * config.n_embd)
    padded = -(-config.vocab_size // _PADDED_TO) * _PADDED_TO
    version = next(number for number, of in _VERSIONS.items() if of == dtype)
    header = np.zeros(_HEADER, dtype="<i4")
    header[:8] = [_MAGIC, version, config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd,
                  padded]  # fmt: skip
    temporary = file.with_name(f".{file.name}.partial")
    parameters = dict(model.named_parameters())
    try:
        with open(temporary, "wb") as out:
            out.write(header.tobytes())
            for name in _order(config):
                tensor = parameters[name].detach().cpu()
                if _is_matrix(name):
                    tensor = tensor.T
                if name == "transformer.wte.weight":
                    tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padded - config.vocab_size))
                out.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def read_llmc(file: Path) -> GPTModel:
    """The model in a checkpoint of llm.c, in float32.

    Raises:
        UserError: for a file that is none.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file, or not a regular one")
    content = np.fromfile(file, dtype=np.uint8)
    header = content[: 4 * _HEADER].view("<i4") if len(content) >= 4 * _HEADER else [0] * 8
    magic, version, n_positions, vocab_size, n_layer, n_head, n_embd, padded = map(int, header[:8])
    if magic != _MAGIC or version not in _VERSIONS:
        raise UserError(
            f"{file}: not a checkpoint of llm.c (magic {magic} and version {version}; those are {_MAGIC} and "
            f"{' or '.join(map(str, _VERSIONS))})"
        )
    sizes: dict[str, Any] = {"n_positions": n_positions, "vocab_size": vocab_size, "n_layer": n_layer, "n_head": n_head}
    try:
        config = GPTConfig(**sizes, n_embd=n_embd)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    content = content[4 * _HEADER :]
    dtype = _VERSIONS[version]
    values = torch.from_numpy(content[: len(content) // dtype.itemsize * dtype.itemsize]).view(dtype)
    # Before a model of that size is made.
    needed = parameter_count(config) + (padded - vocab_size) * n_embd
    if padded < vocab_size or needed != len(values):
        raise UserError(
            f"{file} has {len(values):,} parameters, its header says {needed:,} and {padded:,} rows for "
            f"{vocab_size:,} tokens"
        )
    model = GPTModel(config).eval()
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    shapes["transformer.wte.weight"] = torch.Size([padded, n_embd])
    names = _order(config)
    weights: dict[str, Tensor] = {}
    for name, part in zip(names, values.split([shapes[name].numel() for name in names]), strict=True):
        shape = shapes[name]
        weights[name] = (part.view(shape[::-1]).T if _is_matrix(name) else part.view(shape)).float()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"][:vocab_size]
    model.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    return model


def _is_matrix(name: str) -> bool:
    """Whether a parameter is a matrix of a block, which llm.c has as `[out, in]`."""
    return ".h." in name and name.endswith(("attn.weight", "proj.weight", "fc.weight"))


def _order(config: GPTConfig) -> list[str]:
    """The parameters in llm.c's order."""
    blocks = [f"transformer.h.{layer}.{part}" for part in _OF_A_BLOCK for layer in range(config.n_layer)]
    ends = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    return ["transformer.wte.weight", "transformer.wpe.weight", *blocks, *ends]


def main() -> None:
    parser = ArgumentParser("python -m training.export_llmc", __doc__)
    parser.add_argument("source", help="checkpoint folder or GPT-2 on the Hub, to be written; .bin file, to be read")
    parser.add_argument("target", type=Path, help=".bin file to write; folder to make of one")
    parser.add_option("dtype", choices=["float32", "bfloat16"], default="float32", help="of the .bin file's weights")
    parser.add_option("tokenizer", help="folder or name on the Hub of the tokenizer to put beside what was read")
    args = parser.parse_args()
    if args.source.endswith(".bin"):
        try:
            write_folder(read_llmc(Path(args.source)), args.tokenizer, args.target)
        except ValueError as error:
            raise UserError(str(error)) from error
    else:
        write_llmc(load_weights(args.source), args.target, getattr(torch, args.dtype))
    print(args.target)


if __name__ == "__main__":
    run(main)

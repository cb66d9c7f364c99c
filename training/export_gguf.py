"""Export a checkpoint to GGUF, which llama.cpp, Ollama and LM Studio run.

python -m training.export_gguf runs/mine/checkpoints/step_00019073 mine.gguf --dtype float16

llama.cpp's own `convert_hf_to_gguf.py` makes the same of a checkpoint with GPT-2's vocabulary; it refuses vocabularies
that it has no hash of, as those of your own.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.common.command_line import ArgumentParser, UserError, run

if TYPE_CHECKING:
    from modeling import GPTModel

_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # GPT-2's, which llama.cpp calls gpt-2


def write_gguf(model: "GPTModel", tokenizer: Any, file: Path, dtype: str = "float32") -> None:
    """Write `model` and `tokenizer` into one file.

    Args:
        dtype: float32 or float16, of the matrices; positions, biases and norms stay in float32, as in llama.cpp's own
            converter.

    Raises:
        UserError: for a network or a tokenizer that llama.cpp's GPT-2 is not.
    """
    import gguf
    import torch

    from eval.common.models import check_plain

    config = model.config
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    check_plain(config, "llama.cpp")
    if not _SPLIT.items() <= (backend["pre_tokenizer"] or {}).items() or backend["normalizer"] is not None:
        raise UserError("this tokenizer does not split text as GPT-2's does; use llama.cpp's convert_hf_to_gguf.py")
    temporary = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    try:
        writer.add_block_count(config.n_layer)
        writer.add_context_length(config.n_positions)
        writer.add_embedding_length(config.n_embd)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_head_count(config.n_head)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        types = gguf.LlamaFileType
        writer.add_file_type(types.ALL_F32 if dtype == "float32" else types.MOSTLY_F16)
        _add_tokenizer(writer, tokenizer, backend, config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().cpu()
            if tensor.ndim == 2 and name != "transformer.wpe.weight":
                tensor = (tensor.T.contiguous() if ".h." in name else tensor).to(getattr(torch, dtype))
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert gguf_name is not None, name
            writer.add_tensor(gguf_name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _add_tokenizer(writer: Any, tokenizer: Any, backend: dict[str, Any], vocab_size: int) -> None:
    from gguf import TokenType

    tokens, types = [f"[PAD{number}]" for number in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    special = {token["id"] for token in backend["added_tokens"] if token["special"]}
    for token, number in tokenizer.get_vocab().items():
        tokens[number], types[number] = token, TokenType.CONTROL if number in special else TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)


def main() -> None:
    parser = ArgumentParser("python -m training.export_gguf", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_argument("file", type=Path, help=".gguf file to write")
    parser.add_option("dtype", choices=["float32", "float16"], default="float32", help="of the matrices")
    args = parser.parse_args()
    if find_spec("gguf") is None:
        raise UserError("GGUF is written by the package gguf; pip install gguf")
    from torch import device

    from eval.common.models import load_model

    write_gguf(*load_model(args.model, device("cpu")), args.file, args.dtype)
    print(args.file)


if __name__ == "__main__":
    run(main)

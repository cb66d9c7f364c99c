"""Write a checkpoint as GGUF, which llama.cpp, Ollama and LM Studio run.

python -m training.export_gguf runs/mine/checkpoints/step_00019073 mine.gguf --dtype float16

llama.cpp's own `convert_hf_to_gguf.py` makes the same of a checkpoint with GPT-2's vocabulary; it refuses vocabularies
that it has no hash of, as those of your own.
"""

import json
import os
from pathlib import Path
from typing import Any

from data_prep.common.command_line import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import torch

from data_prep.common.command_line import ArgumentParser, UserError, run
from eval.common.models import check_plain, load_model
from modeling import GPTModel

_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # GPT-2's, which llama.cpp calls gpt-2


def write_gguf(model: GPTModel, tokenizer: Any, file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `model` and `tokenizer` into one file.

    Args:
        dtype: float32 or float16, of the matrices; positions, biases and norms stay in float32, as in llama.cpp's own
            converter.

    Raises:
        UserError: for a network or a tokenizer that llama.cpp's GPT-2 is not.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise UserError("GGUF is written by the package gguf; pip install gguf") from error

    config = model.config
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    check_plain(config, "llama.cpp")
    if not _SPLIT.items() <= (backend["pre_tokenizer"] or {}).items() or backend["normalizer"] is not None:
        raise UserError("this tokenizer does not split text as GPT-2's does; use llama.cpp's convert_hf_to_gguf.py")

    temporary = file.with_name(f".{file.name}.partial")
    writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GPT2])
    try:
        kinds = {torch.float32: gguf.LlamaFileType.ALL_F32, torch.float16: gguf.LlamaFileType.MOSTLY_F16}
        _add_sizes(writer, config, kinds[dtype])
        _add_tokenizer(writer, tokenizer, backend, config.vocab_size)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().cpu()
            if tensor.ndim == 2 and name != "transformer.wpe.weight":
                tensor = (tensor.T.contiguous() if ".h." in name else tensor).to(dtype)
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


def _add_sizes(writer: Any, config: Any, file_type: int) -> None:
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(file_type)


def _add_tokenizer(writer: Any, tokenizer: Any, backend: dict[str, Any], vocab_size: int) -> None:
    import gguf

    special = {token["id"] for token in backend["added_tokens"] if token["special"]}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(
        [kinds.UNUSED if i not in by_id else kinds.CONTROL if i in special else kinds.NORMAL for i in range(vocab_size)]
    )
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
    ):
        if index is not None:
            add(index)


def main() -> None:
    parser = ArgumentParser("python -m training.export_gguf", __doc__)
    parser.add_argument("model", help="checkpoint folder, or a GPT-2 on the Hub")
    parser.add_argument("file", type=Path, help=".gguf file to write")
    parser.add_option("dtype", choices=["float32", "float16"], default="float32", help="of the matrices")
    args = parser.parse_args()
    write_gguf(*load_model(args.model, torch.device("cpu")), args.file, getattr(torch, args.dtype))
    print(args.file)


if __name__ == "__main__":
    run(main)

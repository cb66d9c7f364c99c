"""Convert a checkpoint of nanoGPT (`ckpt.pt`) or build-nanogpt (`model_19072.pt`) to a Hugging Face GPT-2 folder.

python -m modeling.import_checkpoint ckpt.pt my_model
python -m modeling.import_checkpoint log/model_19072.pt my_model --vocab_size 50257 --tokenizer gpt2
"""

import argparse
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.configuration import GPTConfig
from modeling.network import GPTModel

_WRAPPERS = re.compile(r"^((_orig_mod|module)\.)+")  # prefixes of torch.compile and DistributedDataParallel
_SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")


class _Settings:
    """Replaces `GPTConfig`, an instance of which build-nanogpt pickles: fields without code."""


@dataclass(frozen=True)
class Imported:
    """A model from a checkpoint of `trainer` ("nanoGPT" or "build-nanogpt"), saved at `step` (None if unknown)."""

    model: GPTModel
    trainer: str
    step: int | None


def import_checkpoint(file: Path, vocab_size: int | None = None) -> Imported:
    """Reads a `.pt` file without running code in it.

    Removes the prefixes of torch.compile and DistributedDataParallel from names. Biases that nanoGPT does not have are
    zeros. nanoGPT uses the exact GELU, build-nanogpt GPT-2's approximation.

    Args:
        vocab_size: tokens to keep of a padded vocabulary.

    Raises:
        ValueError: for a file of neither trainer, with the reason.
    """
    try:
        return _convert(_load(file), file, vocab_size)
    except ValueError:
        raise
    except Exception as error:  # a file may hold sizes that are no numbers, or tensors of odd kinds
        raise ValueError(f"{file} is not a checkpoint of nanoGPT or build-nanogpt ({error!r})") from error


def _convert(content: Any, file: Path, vocab_size: int | None) -> Imported:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{file} has no weights under 'model', as checkpoints of nanoGPT and build-nanogpt do")
    if "model_args" in content:
        trainer, settings, activation = "nanoGPT", content["model_args"], "gelu"
    elif isinstance(content.get("config"), _Settings):
        trainer, settings, activation = "build-nanogpt", vars(content["config"]), "gelu_new"
    else:
        raise ValueError(f"{file} does not say how large its model is: it has neither 'model_args' nor 'config'")
    if missing := [name for name in _SIZES if name not in settings]:
        raise ValueError(f"{file} does not say its {', '.join(missing)}")
    sizes = {name.replace("block_size", "n_positions"): settings[name] for name in _SIZES}
    config = GPTConfig(**sizes, activation_function=activation)
    weights = {_WRAPPERS.sub("", str(name)): tensor for name, tensor in content["model"].items()}
    if wrong := [name for name, tensor in weights.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{file}: {wrong[0]} is not a tensor")
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:  # checked before a model of that size is created
        raise ValueError(f"{file} has the weights of {len(layers)} layers, and says n_layer={config.n_layer}")
    kept = config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= kept <= config.vocab_size:
        raise ValueError(f"vocab_size={kept}: {file} has {config.vocab_size} tokens")
    config.vocab_size = kept
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in GPTModel(config).named_parameters()}
    weights = _matching_weights(expected, weights, file)
    model = GPTModel(config)
    model.load_state_dict(weights)
    step = content.get("iter_num", content.get("step"))
    return Imported(model.eval(), trainer, step if isinstance(step, int) else None)


def _load(file: Path) -> Any:
    """Returns the content of the file: tensors, numbers, names, and `_Settings` for a pickled `GPTConfig`."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file, or not a regular one")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        code = [name for name in foreign if name.rpartition(".")[2] != "GPTConfig"]
        if not code:
            with torch.serialization.safe_globals([(_Settings, name) for name in foreign]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise errors of any kind
        raise ValueError(f"{file} is not a checkpoint that torch can read ({error})") from error
    raise ValueError(f"{file} would run code to be read ({', '.join(code)}); it is not read")


def _matching_weights(expected: dict[str, torch.Size], found: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Returns the weight of each parameter of the model. `ValueError` for a name or a shape that does not match."""
    head, embeddings = found.pop("lm_head.weight", None), found.get("transformer.wte.weight")
    if head is not None and embeddings is not None and not torch.equal(head, embeddings):
        raise ValueError(f"{file}: its head is not tied to its embeddings, as GPT-2's is")
    masks = {name for name in found if name.endswith((".attn.bias", ".attn.masked_bias"))}
    if unknown := sorted(found.keys() - expected.keys() - masks):
        raise ValueError(f"{file}: {unknown[0]} is not a parameter of GPT-2")
    weights = {}
    for name, shape in expected.items():
        tensor = found.get(name)
        if tensor is None and name.endswith(".bias"):
            tensor = torch.zeros(shape)
        elif tensor is None:
            raise ValueError(f"{file}: {name} is missing")
        if name == "transformer.wte.weight":
            tensor = tensor[: shape[0]]
        elif tensor.dim() == 2 and ".h." in name:  # `nn.Linear`'s layout
            tensor = tensor.T
        if tensor.shape != shape:
            raise ValueError(f"{file}: {name} is {list(tensor.shape)}, expected {list(shape)}")
        weights[name] = tensor.float()
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def write_folder(model: GPTModel, tokenizer: str | None, folder: Path) -> None:
    """Saves a model, and a tokenizer that `AutoTokenizer` loads, to a new folder: completely or not at all.

    Raises:
        ValueError: for a folder that exists, and for a tokenizer that does not or has more tokens than the model.
    """
    from transformers import AutoTokenizer

    partial = folder.with_name(f".{folder.name}.partial")
    if taken := [path for path in (folder, partial) if path.exists()]:
        raise ValueError(f"{taken[0]} exists; choose another name")
    eos = model.config.eos_token_id
    end_of_text = eos if isinstance(eos, int) and eos < model.config.vocab_size else None
    try:
        if tokenizer is not None:
            try:
                found = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            except Exception as error:  # the libraries that read its files raise errors of any kind
                raise ValueError(f"tokenizer={tokenizer!r}: {' '.join(str(error).split())[:300]}") from error
            if len(found) > model.config.vocab_size:
                raise ValueError(f"tokenizer={tokenizer!r} has {len(found)} tokens, model {model.config.vocab_size}")
            found.save_pretrained(partial)
            end_of_text = found.eos_token_id
        for config in (model.config, model.generation_config):
            config.bos_token_id = config.eos_token_id = end_of_text
        model.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("python -m modeling.import_checkpoint", description=summary, allow_abbrev=False)
    parser.add_argument("file", type=Path, help=".pt file of nanoGPT or build-nanogpt")
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--vocab_size", type=int, help="tokens to keep of a padded vocabulary: 50257 of 50304")
    parser.add_argument("--tokenizer", help="tokenizer to save with the weights: folder, or name on the Hub")
    args = parser.parse_args()
    try:
        imported = import_checkpoint(args.file, args.vocab_size)
        write_folder(imported.model, args.tokenizer, args.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    step = "" if imported.step is None else f" at step {imported.step:,}"
    sizes = f"{imported.model.num_parameters():,} parameters, {imported.model.config.vocab_size:,} tokens"
    print(f"{args.folder}: {sizes}, of {imported.trainer}{step}")


if __name__ == "__main__":
    main()

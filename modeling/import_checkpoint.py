"""Turn a checkpoint of nanoGPT (`ckpt.pt`) or of build-nanogpt (`model_19072.pt`) into a Hugging Face GPT-2 folder.

python -m modeling.import_checkpoint ckpt.pt my_model
python -m modeling.import_checkpoint log/model_19072.pt my_model --vocab_size 50257 --tokenizer gpt2
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from modeling.configuration import GPTConfig
from modeling.network import GPTModel

_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and of DistributedDataParallel
_SIZES = {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
          "n_embd": "n_embd"}  # fmt: skip


class _Settings:
    """Stands in for the class of the same name that build-nanogpt pickles with its weights: fields, and no code."""


@dataclass(frozen=True)
class Imported:
    """A checkpoint of another trainer.

    Attributes:
        trainer: `nanoGPT` or `build-nanogpt`.
        step: that it was saved at; None if it does not say.
    """

    model: GPTModel
    trainer: str
    step: int | None


def import_checkpoint(file: Path, vocab_size: int | None = None) -> Imported:
    """Read a `.pt` file, without running any code that is in it.

    Names that torch.compile or DistributedDataParallel have left in the weights are undone; where nanoGPT has no biases
    there are zeros. nanoGPT's GELU is the exact one, build-nanogpt's GPT-2's approximation.

    Args:
        vocab_size: of the first tokens to keep, where the vocabulary was padded in training.

    Raises:
        ValueError: for a file that is neither's, with what is wrong with it.
    """
    try:
        return _convert(_load(file), file, vocab_size)
    except ValueError:
        raise
    except Exception as error:  # a file of anybody's: sizes that are no numbers, tensors of odd kinds
        raise ValueError(
            f"{file} is not a checkpoint of nanoGPT or build-nanogpt ({type(error).__name__}: {error})"
        ) from error


def _convert(content: Any, file: Path, vocab_size: int | None) -> Imported:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{file} has no weights under 'model', as checkpoints of nanoGPT and build-nanogpt do")
    if "model_args" in content:
        trainer, settings, activation = "nanoGPT", content["model_args"], "gelu"
    elif isinstance(content.get("config"), _Settings):
        trainer, settings, activation = "build-nanogpt", vars(content["config"]), "gelu_new"
    else:
        raise ValueError(f"{file} does not say how large its model is, under neither 'model_args' nor 'config'")
    if missing := [name for name in _SIZES if name not in settings]:
        raise ValueError(f"{file} does not say its {', '.join(missing)}")

    config = GPTConfig(**{ours: settings[theirs] for theirs, ours in _SIZES.items()}, activation_function=activation)
    weights = {_bare(str(name)): tensor for name, tensor in content["model"].items()}
    if wrong := [name for name, tensor in weights.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(f"{file}: {wrong[0]} is not a tensor")
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:  # before a model of that size is made
        raise ValueError(f"{file} has the weights of {len(layers)} layers, and says n_layer={config.n_layer}")
    keep = config.vocab_size if vocab_size is None else vocab_size
    if not 1 <= keep <= config.vocab_size:
        raise ValueError(f"vocab_size={keep}: {file} has {config.vocab_size} tokens")
    config.vocab_size = keep
    with torch.device("meta"):
        wanted = dict(GPTModel(config).named_parameters())
    weights = _weights_of(wanted, weights, file)
    model = GPTModel(config)
    model.load_state_dict(weights)
    step = content.get("iter_num", content.get("step"))
    return Imported(model.eval(), trainer, step if isinstance(step, int) else None)


def _load(file: Path) -> Any:
    """What is in the file: tensors, numbers, names, and settings under our own stand-in for their class."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file, or not a regular one")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        code = [name for name in foreign if name.rpartition(".")[2] != "GPTConfig"]
        if not code:
            with torch.serialization.safe_globals([(_Settings, name) for name in foreign]):
                return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, LookupError, EOFError, AttributeError, UnpicklingError) as error:
        raise ValueError(f"{file} is not a checkpoint that torch can read ({error})") from error
    raise ValueError(f"{file} would run code to be read ({', '.join(code)}); it is not read")


def _bare(name: str) -> str:
    while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def _weights_of(wanted: dict[str, Tensor], found: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """What `found` has for each parameter of the model; every name and every shape is accounted for."""
    head, embeddings = found.pop("lm_head.weight", None), found.get("transformer.wte.weight")
    if head is not None and embeddings is not None and not torch.equal(head, embeddings):
        raise ValueError(f"{file}: its head is not tied to its embeddings, as GPT-2's is")
    masks = {name for name in found if name.endswith((".attn.bias", ".attn.masked_bias"))}
    if unknown := sorted(found.keys() - wanted.keys() - masks):
        raise ValueError(f"{file}: {unknown[0]} is not a parameter of GPT-2")
    weights = {}
    for name, parameter in wanted.items():
        tensor = found.get(name)
        if tensor is None and name.endswith(".bias"):
            tensor = torch.zeros(parameter.shape)
        elif tensor is None:
            raise ValueError(f"{file}: {name} is missing")
        if name == "transformer.wte.weight":
            tensor = tensor[: parameter.shape[0]]
        if tensor.shape != parameter.shape:
            raise ValueError(f"{file}: {name} is {list(tensor.shape)}, expected {list(parameter.shape)}")
        weights[name] = tensor.float()
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def write_folder(model: GPTModel, tokenizer: str | None, folder: Path) -> None:
    """Save a model, and a tokenizer that `AutoTokenizer` loads, into a new folder: all of it or nothing.

    Raises:
        ValueError: for a folder that is there, and for a tokenizer that is not, or has more tokens than the model.
    """
    from transformers import AutoTokenizer

    if folder.exists():
        raise ValueError(f"{folder} exists; choose another name")
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        raise ValueError(f"{partial} is in the way, perhaps of an import that was killed; remove it")
    end_of_text = model.config.eos_token_id if model.config.eos_token_id < model.config.vocab_size else None
    try:
        if tokenizer is not None:
            try:
                found = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            except Exception as error:  # files of anybody's
                raise ValueError(f"tokenizer={tokenizer!r}: {' '.join(str(error).split())[:300]}") from error
            if len(found) > model.config.vocab_size:
                raise ValueError(
                    f"tokenizer={tokenizer!r} has {len(found)} tokens, the model {model.config.vocab_size}"
                )
            found.save_pretrained(partial)
            end_of_text = found.eos_token_id
        for config in (model.config, model.generation_config):
            config.bos_token_id = config.eos_token_id = end_of_text
        model.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling.import_checkpoint", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help=".pt file of nanoGPT or build-nanogpt")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--vocab_size", type=int, help="tokens to keep of a padded vocabulary: 50257 of 50304")
    parser.add_argument("--tokenizer", help="folder or name on the Hub of the tokenizer to put beside the weights")
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

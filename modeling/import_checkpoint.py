"""Convert a checkpoint of nanoGPT (`ckpt.pt`) or build-nanogpt (`model_19072.pt`) to a Hugging Face GPT-2 folder.

python -m modeling.import_checkpoint ckpt.pt my_model
python -m modeling.import_checkpoint log/model_19072.pt my_model --vocab_size 50257 --tokenizer gpt2
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling.gpt import GPTModel

# Names that torch.compile, DDP, activation checkpointing and FSDP put into those of the parameters that they wrap.
_WRAPPERS = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_SIZES = {"block_size": "n_positions", **{name: name for name in ("vocab_size", "n_layer", "n_head", "n_embd")}}


class _Settings:
    """Stands in for the `GPTConfig` instance that build-nanogpt pickles: fields without code."""


def bare_name(name: str) -> str:
    """Strips the prefixes that wrappers add to a parameter's name."""
    return _WRAPPERS.sub("", name)


def import_checkpoint(file: Path, vocab_size: int | None = None) -> "GPTModel":
    """Reads a `.pt` file without running any code in it.

    Biases that nanoGPT does not have are zeros. nanoGPT uses the exact GELU, build-nanogpt GPT-2's approximation.

    Args:
        vocab_size: tokens to keep of a padded vocabulary.

    Raises:
        ValueError: for a file of neither trainer, with the reason.
    """
    content = _load(file)
    try:
        return _convert(content, vocab_size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # a file may hold sizes that are no numbers, or tensors of odd kinds
        raise ValueError(f"{file} is not a checkpoint of nanoGPT or build-nanogpt ({error!r})") from error


def _load(file: Path) -> Any:
    """Returns the content of the file: tensors, numbers, names, and `_Settings` for a pickled `GPTConfig`."""
    import torch

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


def _convert(content: Any, vocab_size: int | None) -> "GPTModel":
    import torch

    from modeling import GPTConfig, GPTModel

    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it has no weights under 'model', as checkpoints of nanoGPT and build-nanogpt do")
    if "model_args" in content:
        settings, activation = content["model_args"], "gelu"
    elif isinstance(content.get("config"), _Settings):
        settings, activation = vars(content["config"]), "gelu_new"
    else:
        raise ValueError("it does not say how large its model is: it has neither 'model_args' nor 'config'")
    if missing := [name for name in _SIZES if name not in settings]:
        raise ValueError(f"it does not say its {', '.join(missing)}")
    config = GPTConfig(activation_function=activation, **{ours: settings[name] for name, ours in _SIZES.items()})
    masks = (".attn.bias", ".attn.masked_bias")
    weights = {bare_name(name): tensor for name, tensor in content["model"].items() if not name.endswith(masks)}
    layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
    if len(layers) != config.n_layer:  # checked before a model of that size is created
        raise ValueError(f"it has the weights of {len(layers)} layers, and says n_layer={config.n_layer}")
    embeddings = weights["transformer.wte.weight"]
    if not weights.pop("lm_head.weight", embeddings).equal(embeddings):
        raise ValueError("its head is not tied to its embeddings, as GPT-2's is")
    if vocab_size is not None:
        if not 1 <= vocab_size <= config.vocab_size:
            raise ValueError(f"vocab_size={vocab_size}: it has {config.vocab_size} tokens")
        config.vocab_size, weights["transformer.wte.weight"] = vocab_size, embeddings[:vocab_size]
    with torch.device("meta"):  # no memory for a size that the weights do not have
        model = GPTModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            weights.setdefault(name, torch.zeros(parameter.shape))
    for name, tensor in weights.items():  # matrices are `nn.Linear`'s there
        weights[name] = (tensor.T if tensor.dim() == 2 and ".h." in name else tensor).float().contiguous()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # names and shapes
        raise ValueError(" ".join(str(error).split())) from error
    model.tie_weights()
    return model.eval()


def write_folder(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves a model, and a tokenizer unless it is None, to a new folder atomically.

    Raises:
        ValueError: for a folder that exists, or cannot be written.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists; choose another name")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        written = Path(temporary) / folder.name
        try:
            for part in (model, tokenizer):
                if part is not None:
                    part.save_pretrained(written)
        except Exception as error:  # of several libraries, for a full disk
            raise ValueError(f"{folder}: cannot be written ({' '.join(str(error).split())})") from error
        written.rename(folder)


def main() -> None:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser("python -m modeling.import_checkpoint", description=summary, allow_abbrev=False)
    parser.add_argument("file", type=Path, help=".pt file of nanoGPT or build-nanogpt")
    parser.add_argument("folder", type=Path, help="folder to create")
    parser.add_argument("--vocab_size", type=int, help="tokens to keep of a padded vocabulary: 50257 of 50304")
    parser.add_argument("--tokenizer", help="tokenizer to save with the weights: folder, or name on the Hub")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    try:
        model, tokenizer = import_checkpoint(args.file, args.vocab_size), None
        end_of_text, size = model.config.eos_token_id, model.config.vocab_size
        if args.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
            if len(tokenizer) > size:
                raise ValueError(f"tokenizer={args.tokenizer!r} has {len(tokenizer)} tokens, model {size}")
            end_of_text = tokenizer.eos_token_id
        known = isinstance(end_of_text, int) and end_of_text < size
        for config in (model.config, model.generation_config):
            config.bos_token_id = config.eos_token_id = end_of_text if known else None
        write_folder(model, tokenizer, args.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{args.folder}: {model.num_parameters():,} parameters, {model.config.vocab_size:,} tokens")


if __name__ == "__main__":
    main()

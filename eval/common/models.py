"""A trained model and its tokenizer, from a folder or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.common.command_line import UserError, first_line, listed
from data_prep.tokenization.tokenizer import hf_tokenizer
from modeling import GPTConfig, GPTModel, parameter_count
from modeling.loss import nats_and_gradient


def load_model(name: str, device: torch.device | None = None) -> tuple[GPTModel, Any]:
    """A model in float32 and evaluation mode, and its tokenizer, from a folder or the Hub.

    Raises:
        UserError: where there is none, or one that is not GPT-2's, or no tokenizer beside it.
    """
    check_folder(name)
    model, tokenizer = load_weights(name), hf_tokenizer(name)
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= model.config.vocab_size:
        raise UserError(
            f"model {name!r}: its tokenizer has id {largest}, its vocabulary {model.config.vocab_size} tokens"
        )
    return model.to(device or torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def load_weights(name: str) -> GPTModel:
    """The model of `load_model` by itself, on the CPU."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return from_pretrained(name).eval()
    except (OSError, ImportError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"model {name!r}: {first_line(error)}") from error


def from_pretrained(source: str | Path, **options: Any) -> GPTModel:
    """`GPTModel.from_pretrained` in float32, with every tensor accounted for: transformers fills what a file lacks with
    random numbers, and says so in a warning.

    Raises:
        ValueError: naming the tensors that are missing, unknown, or of another shape, and for files that are none.
    """
    try:
        _check_size(Path(source))
        # Mismatched sizes are "ignored" for the report of all of them, which is what is checked here.
        options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, report = GPTModel.from_pretrained(source, **options)
    except (OSError, ImportError):
        raise
    except Exception as error:  # files of anybody's: the libraries that read them raise whatever comes up
        raise ValueError(" ".join(str(error).split())) from error
    problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    problems += [f"{name} is unknown" for name in sorted(report["unexpected_keys"])]
    problems += [
        f"{name} is {list(found)}, expected {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
    ]
    if problems:
        raise ValueError(f"its weights are not those of its config.json: {listed(problems)}")
    return model


def _check_size(folder: Path) -> None:
    """Refuse a configuration of more parameters than the weights beside it have bytes (`ValueError`), before a model of
    that size is made."""
    if not folder.is_dir():
        return
    held = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    if (count := parameter_count(GPTConfig.from_pretrained(folder))) > held:
        raise ValueError(f"its config.json describes {count:,} parameters, the weights beside it have {held:,} bytes")


def read_config(name: str) -> GPTConfig:
    """The configuration of a model in a folder or on the Hub (`UserError` where there is none of a GPT-2)."""
    try:
        return GPTConfig.from_pretrained(name)
    except Exception as error:  # as above
        raise UserError(f"model {name!r}: {first_line(error)}") from error


def check_plain(config: GPTConfig, reader: str, **also: Any) -> None:
    """Check that a network is the one that other programs take every GPT-2 for.

    Args:
        reader: the program, for the message.
        also: more fields of the configuration, each with the only value that it reads.

    Raises:
        UserError: with all fields that are otherwise.
    """
    fixed = {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    fixed |= also
    if other := [f"{name}={getattr(config, name)}" for name, value in fixed.items() if getattr(config, name) != value]:
        raise UserError(f"{reader}'s GPT-2 is another network than this one, which has {', '.join(other)}")


def check_folder(name: str) -> None:
    """Check that a folder, if `name` is one, holds a tokenizer beside the model (`UserError`)."""
    if Path(name).is_dir() and not any((*Path(name).glob("tokenizer*"), *Path(name).glob("vocab.json"))):
        raise UserError(f"model {name!r}: no tokenizer in it; copy tokenizer.json and its config there")


def compile_blocks(model: GPTModel, dynamic: bool | None = False) -> None:
    """Compile each block, in place, so that no wrapper's name gets into the weights; and the loss.

    Args:
        dynamic: as in `torch.compile`. For few shapes, each of which gets its own code, none of it slower for the
            others; None for many.
    """
    # It would split a block's graph where a bucket of gradients ends; between blocks there are enough such places.
    torch._dynamo.config.optimize_ddp = False
    model.of_logits = torch.compile(nats_and_gradient, dynamic=dynamic)
    for block in model.transformer.h:
        block.compile(dynamic=dynamic)


def is_compiled(model: GPTModel) -> bool:
    """Whether the model or its blocks run compiled, and so should see few shapes."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def evaluating(model: GPTModel, attn_implementation: str | None = None) -> Iterator[None]:
    """Evaluate without gradients and dropout, with another attention kernel if one is named; then all is as before."""
    was_training, attention = model.training, model.config._attn_implementation
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new length, which takes longer than it saves
    model.eval()
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        if attn_implementation is not None:
            model.set_attn_implementation(attention)

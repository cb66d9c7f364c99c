"""A trained model and its tokenizer, from a folder or the Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_prep.cli import UserError, first_line
from data_prep.tokenizer import hf_tokenizer
from modeling import GPTConfig, GPTModel


def load_model(name: str, device: torch.device | None = None) -> tuple[GPTModel, Any]:
    """A model in float32 and evaluation mode, and its tokenizer, from a folder or the Hub.

    Raises:
        UserError: where there is none, or one that is not GPT-2's, or no tokenizer beside it.
    """
    check_folder(name)
    return load_weights(name).to(device or torch.accelerator.current_accelerator() or "cpu"), hf_tokenizer(name)


def load_weights(name: str) -> GPTModel:
    """The model of `load_model` by itself, on the CPU."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        return GPTModel.from_pretrained(name, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
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


def compile_blocks(model: GPTModel) -> None:
    """Compile each block, in place, so that no wrapper's name gets into the weights; and the loss."""
    model.compile_loss = True
    for block in model.transformer.h:
        block.compile()


def is_compiled(model: GPTModel) -> bool:
    """Whether the model or its blocks run compiled, and so should see few shapes."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def evaluating(model: GPTModel, attn_implementation: str | None = None) -> Iterator[None]:
    """Evaluate without gradients and dropout, with another attention kernel if one is named; then all is as before."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        if attn_implementation is not None:
            model.set_attn_implementation(attention)

"""Loading, checking and compiling a trained model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_NAME
from transformers.utils import logging

from data_prep.common.command_line import UserError, first_line, listed
from data_prep.common.files import describe_path
from data_prep.common.hub import limit_waiting
from data_prep.tokenization.tokenizer import hf_tokenizer, missing_tokenizer
from eval.common.launch import compile_options
from modeling import GPTConfig, GPTModel, parameter_count
from modeling.loss import nats_and_gradient


def load_model(name: str, device: torch.device | None = None) -> tuple[GPTModel, Any]:
    """Loads a float32 model in evaluation mode and its tokenizer from a folder or the Hub. Raises `UserError` if either
    is missing."""
    check_folder(name)
    model, tokenizer = from_pretrained(name), hf_tokenizer(name)
    if (largest := max(tokenizer.get_vocab().values(), default=0)) >= model.config.vocab_size:
        raise UserError(
            f"model {name!r}: its tokenizer has id {largest}, its vocabulary {model.config.vocab_size} tokens"
        )
    moved: Any = model.to  # transformers' wrapper of it has no types
    return moved(device or torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def from_pretrained(source: str | Path, **options: Any) -> GPTModel:
    """Loads a float32 model in evaluation mode, without its tokenizer, on the CPU; `options` as in transformers. Raises
    `UserError` for unreadable files and for missing, unknown or mismatched weights, where transformers only warns."""
    logging.disable_progress_bar()
    # With "ignored" sizes transformers reports all mismatches instead of raising at the first.
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _user_error(source):
        _check_path(source)
        loaded: Any = GPTModel.from_pretrained(source, **options)
        model, report = loaded
        problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
        problems += [f"{name} is unknown" for name in sorted(report["unexpected_keys"])]
        problems += [f"{name} is {list(has)}, expected {list(shape)}" for name, has, shape in report["mismatched_keys"]]
        if problems:
            raise ValueError(f"its weights are not those of its config.json: {listed(problems)}")
    return model


def read_config(name: str) -> GPTConfig:
    """Reads the configuration of a GPT-2 in a folder or on the Hub. Raises `UserError` if there is none."""
    with _user_error(name):
        _check_path(name)
        return GPTConfig.from_pretrained(name)


def check_folder(name: str) -> None:
    """Raises `UserError` if `name` is a path without a model, or a folder without a tokenizer."""
    with _user_error(name):
        _check_path(name)
    if problem := missing_tokenizer(name):
        raise UserError(f"model {name!r}: {problem}")


@contextmanager
def _user_error(source: str | Path) -> Iterator[None]:
    """Turns any error of the libraries that read the files into a `UserError` with the model's name."""
    try:
        yield
    except Exception as error:
        raise UserError(f"model {str(source)!r}: {first_line(error)}") from error


def _check_path(source: str | Path) -> None:
    """Raises `ValueError` for a path without a model, and for a config.json with more parameters than the weights have
    bytes, before allocating memory for it. Any other name is a name on the Hub."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or len(folder.parts) > 2 or str(source).startswith("."):
            raise ValueError(f"it is {describe_path(folder)}")
        limit_waiting()
        return
    weights = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    if not weights or not (folder / CONFIG_NAME).is_file():
        kind = describe_path(folder)
        other = f"it is {kind}" if kind else "rename it, or call from elsewhere, to load the Hub's model of that name"
        raise ValueError(f"this folder has no model ({CONFIG_NAME} and model.safetensors); {other}")
    size = sum(file.stat().st_size for file in weights)
    if (count := parameter_count(GPTConfig.from_pretrained(folder))) > size:
        raise ValueError(f"its config.json describes {count:,} parameters, the weights beside it have {size:,} bytes")


def check_plain(config: GPTConfig, reader: str, **also: Any) -> None:
    """Raises `UserError` with all configuration fields that the program `reader` does not support. `also` adds fields,
    each with its only supported value."""
    fixed = {"activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    fixed |= also
    if other := [f"{name}={getattr(config, name)}" for name, value in fixed.items() if getattr(config, name) != value]:
        raise UserError(f"{reader}'s GPT-2 is another network than this one, which has {', '.join(other)}")


def compile_blocks(model: GPTModel, dynamic: bool | None = False) -> None:
    """Compiles each block and the loss in place, keeping the names of weights. Backend and mode come from the
    Accelerate config, if it names them.

    Args:
        dynamic: as in `torch.compile`. False compiles for each shape, which is fastest for few; None is for many.
    """
    # DDP's optimizer would split the graph of a block at each bucket of gradients. Splits between blocks are enough.
    torch._dynamo.config.optimize_ddp = False
    options: dict[str, Any] = {"dynamic": dynamic} | (compile_options() or {})
    model.loss_kernel = torch.compile(nats_and_gradient, **options)
    for block in model.transformer.h:
        block.compile(**options)


def is_compiled(model: GPTModel) -> bool:
    """Whether the model or its blocks are compiled, so that inputs should have few shapes."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def evaluating(model: Any, attn_implementation: str | None = None) -> Iterator[None]:
    """Disables gradients and dropout, optionally switches the attention kernel, and restores everything at the end."""
    was_training, attention = model.training, model.config._attn_implementation
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for each new length, which takes longer than it saves
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

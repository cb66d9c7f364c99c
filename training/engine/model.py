"""Model of a run: new or from a checkpoint, its kernels, its memory, and the micro-batch that fits."""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from data_prep.common.command_line import UserError
from data_prep.tokenization.tokenizer import hf_tokenizer
from eval.common.devices import peak_memory
from eval.common.launch import compile_options, on_cpu
from eval.common.models import check_folder, compile_blocks, from_pretrained, is_compiled, read_config
from modeling import GPTConfig, GPTModel
from training.engine.data import Batches, Data
from training.engine.optimizer import set_learning_rate, share_work
from training.engine.step import training_step
from training.settings.schema import MODEL_SIZES, TrainingConfig

# Up to this length a CPU is faster with full attention matrices than with the fused kernel (docs/benchmarks.md).
_EAGER_TOKENS = 512
# Selective checkpointing keeps the results that cost most to compute again.
_KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]
_SPARE = 0.1  # of the memory: steps differ


def make_model(config: TrainingConfig, data: Data, source: str | Path | None) -> GPTModel:
    """Creates a model with the data's vocabulary: loaded from `source`, or new with weights from the run's seed."""
    settings = config.model
    dropout: dict[str, Any] = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), settings.dropout)
    kernel = {"attn_implementation": attention_kernel(config)}
    try:
        if source is None:
            eos = data.tokenizer.eos_token_id
            sizes: dict[str, Any] = {name: getattr(settings, name) for name in MODEL_SIZES}
            model_config = GPTConfig(
                vocab_size=data.tokenizer.vocab_size, **sizes, **dropout, bos_token_id=eos, eos_token_id=eos
            )
            torch.manual_seed(config.run.seed)
            model = GPTModel._from_config(model_config, **kernel)
        else:
            model = from_pretrained(source, use_safetensors=True, **dropout, **kernel)
    except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "" if source is None else f" of {source}"
        raise UserError(f"cannot make the model{where}: {' '.join(str(error).split())}") from error
    model.z_loss = config.optimizer.z_loss
    devices = config.devices
    if devices.gradient_checkpointing != "none":
        checkpoint_activations(model, selective=devices.gradient_checkpointing == "selective")
    if devices.torch_compile == "auto":
        compiled = compile_options() is not None or (torch.cuda.is_available() and not on_cpu())
    else:
        compiled = devices.torch_compile
    if compiled:
        compile_blocks(model)
    return model.train()


def attention_kernel(config: TrainingConfig) -> str:
    """Attention kernel from the settings; `auto` chooses the faster one."""
    if config.model.attn_implementation != "auto":
        return config.model.attn_implementation
    return "eager" if on_cpu() and config.sequence_length <= _EAGER_TOKENS else "sdpa"


def check_initial_model(name: str, config: TrainingConfig, data: Data, tokenizer: Any) -> None:
    """Checks that `model_name_or_path` has the sizes of the settings and the tokenizer of the data (`UserError`)."""
    check_folder(name)
    saved = read_config(name)
    if different := config.different_sizes(saved.to_dict()):
        raise UserError(
            f"model_name_or_path={name!r} is another model ({'; '.join(different)}); leave those settings out"
        )
    if hf_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"model_name_or_path={name!r} has another tokenizer than {data.folders[0]}; prepare the data with "
            f"--tokenizer {name}"
        )


def find_micro_batch(
    config: TrainingConfig,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train_data: Batches,
) -> int:
    """Finds the largest micro-batch that fits in every rank's memory by trying steps that change nothing. Collective.

    Raises `UserError` if not even one sequence fits, and if a sharded model runs out of memory: its ranks need each
    other within a step, so that the search cannot continue.
    """
    settings = config.optimizer
    sharded = accelerator.distributed_type == "FSDP"
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    set_learning_rate(optimizer, 0.0)
    share_work(optimizer, sharded)

    def attempt(size: int) -> None:
        batch = train_data.sequences(0, size)
        try:
            # A rank that runs out of memory must not leave the others waiting for its gradients, or its share of Muon.
            with contextlib.nullcontext() if sharded else accelerator.no_sync(model):
                training_step(accelerator, model, optimizer, [batch], settings.max_grad_norm)
        except torch.OutOfMemoryError as error:
            if not sharded:
                raise
            raise UserError(
                f"per_device_train_batch_size=auto: no memory for {size} sequences; give a number"
            ) from error

    def all_agree(answer: bool) -> bool:
        return bool(accelerator.gather(torch.tensor([answer], device=accelerator.device)).all())

    bare = accelerator.unwrap_model(model)
    compiled = is_compiled(bare)
    if compiled:
        compile_blocks(bare, dynamic=None)
    sizes = config.micro_batches(accelerator.num_processes)
    largest = largest_micro_batch(attempt, sizes, accelerator.device, all_agree)

    share_work(optimizer, True)
    optimizer.zero_grad()
    optimizer.state.clear()
    if scaler is not None:
        accelerator.scaler.load_state_dict(scaler)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    if compiled:
        torch.compiler.reset()  # code for any size is slower than code for one
        compile_blocks(bare)
    return largest


def checkpoint_activations(model: GPTModel, selective: bool) -> None:
    """Makes the blocks recompute activations in the backward pass (arXiv:1604.06174)."""
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _KEPT)
    model.activation_checkpointing_enable(options)


def largest_micro_batch(
    attempt: Callable[[int], None], sizes: list[int], device: torch.device, all_agree: Callable[[bool], bool]
) -> int:
    """The largest of the ascending `sizes` that fits in the memory of every rank; `UserError` if none does. Collective.

    Stops when an attempt fails, or when the memory of the next size, extrapolated from the two before it, exceeds the
    memory of any rank.

    Args:
        attempt: runs a step of N sequences. If it runs out of memory, it must not leave other ranks waiting.
        all_agree: whether the argument is true on every rank.
    """
    room = (1 - _SPARE) * memory_for_this_process(device)
    measured: list[tuple[int, int]] = []  # sizes that fit, with their peak memory
    for size in sizes:
        fits = True
        if len(measured) >= 2:
            (before, peak_before), (last, peak) = measured[-2:]
            fits = peak + (size - last) * (peak - peak_before) / (last - before) <= room
        if not all_agree(fits):
            break
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            fits = False
        if not all_agree(fits):
            break
        measured.append((size, peak_memory(device)))
    if not measured:
        raise UserError(
            f"per_device_train_batch_size=auto: no memory for {sizes[0]} sequence; take a smaller model, shorter "
            f"sequences or --gradient_checkpointing full"
        )
    return measured[-1][0]


def memory_for_this_process(device: torch.device) -> int:
    """Bytes available to this process: its GPU's, or its own plus its share of the machine's free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    import psutil

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return peak_memory(device) + psutil.virtual_memory().available // processes

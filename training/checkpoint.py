"""Checkpoints: an ordinary HF GPT-2 folder with its tokenizer, and beside it what it takes to go on.

step_00000500/
  model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json
  training_state/  state.json  optimizer.safetensors  rng_0.safetensors ...
  COMPLETE         sha256 of each file, written last
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_prep.cli import UserError
from data_prep.shards import file_hash

COMPLETE = "COMPLETE"
STATE = Path("training_state")


@dataclass
class RunState:
    """All that changes during a run besides weights, optimizer and random numbers.

    Attributes:
        step: optimizer steps done.
        position: training sequences consumed.
        data: what decides the order of data; a run is not continued under another.
        best_val_loss, best_step: the lowest validation loss of a saved checkpoint, in nats per token.
        grad_scaler: the loss scale of fp16.
    """

    data: dict[str, Any]
    step: int = 0
    position: int = 0
    best_val_loss: float | None = None
    best_step: int | None = None
    grad_scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    tokenizer_folder: Path,
    checkpoints: Path,
) -> Path:
    """Write `step_NNNNNNNN` under `checkpoints`; called by all processes together.

    The files are written under another name, hashed and moved into place; `COMPLETE` comes last.
    """
    folder = checkpoints / f"step_{state.step:08d}"
    partial = checkpoints / f".{folder.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / STATE).mkdir(parents=True)
    accelerator.wait_for_everyone()

    weights = accelerator.get_state_dict(model)
    moments = _optimizer_tensors(model, optimizer)
    save_file(_random_state(accelerator.device), partial / STATE / f"rng_{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(partial, state_dict=weights)
        shutil.copytree(tokenizer_folder, partial, dirs_exist_ok=True)
        save_file(moments, partial / STATE / "optimizer.safetensors")
        if accelerator.scaler is not None:
            state.grad_scaler = accelerator.scaler.state_dict()
        (partial / STATE / "state.json").write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        _commit(partial, folder)
    accelerator.wait_for_everyone()
    return folder


def _commit(partial: Path, folder: Path) -> None:
    hashes = {str(path.relative_to(partial)): file_hash(path) for path in sorted(partial.rglob("*")) if path.is_file()}
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    temporary = folder / f".{COMPLETE}"
    temporary.write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    temporary.rename(folder / COMPLETE)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The checkpoints that were written to the end, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{COMPLETE}"))


def prune_checkpoints(checkpoints: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` complete checkpoints and the best."""
    for folder in complete_checkpoints(checkpoints)[:-keep_last]:
        if folder.name != f"step_{best_step or 0:08d}":
            (folder / COMPLETE).unlink()  # first of all, so that a half-removed one is never taken for whole
            shutil.rmtree(folder)


def load_state(folder: Path) -> RunState:
    """The `RunState` of a checkpoint.

    Raises:
        UserError: for a checkpoint without one, or one whose files are not those that were written.
    """
    try:
        hashes = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        damaged = [name for name, digest in hashes.items() if file_hash(folder / name) != digest]
        if damaged:
            raise UserError(
                f"{folder}: damaged ({', '.join(damaged)}); remove this folder to resume from the one before"
            )
        return RunState(**json.loads((folder / STATE / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: not a checkpoint to resume from ({error})") from error


def load_training_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState, folder: Path
) -> None:
    """Restore optimizer, loss scale and random numbers; the weights are loaded by `GPTModel.from_pretrained`."""
    try:
        _restore_optimizer(model, optimizer, load_file(folder / STATE / "optimizer.safetensors"))
        # A process that the saved run did not have keeps the generator it was seeded with.
        random_state = folder / STATE / f"rng_{accelerator.process_index}.safetensors"
        if random_state.exists():
            _restore_random_state(load_file(random_state), accelerator.device)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{folder}: cannot be resumed from ({error})") from error
    if accelerator.scaler is not None and state.grad_scaler:
        accelerator.scaler.load_state_dict(state.grad_scaler)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as whole tensors named `PARAMETER/KEY`, as in `transformer.wte.weight/exp_avg`."""
    tensors = {}
    for name, parameter in _named_parameters(model):
        for key, value in optimizer.state[parameter].items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            tensors[f"{name}/{key}"] = whole.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit("/", 1)
        by_parameter.setdefault(parameter, {})[key] = tensor
    for name, parameter in _named_parameters(model):
        for key, tensor in by_parameter[name].items():
            optimizer.state[parameter][key] = _placed_like(tensor, parameter)


def _placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    tensor = tensor.to(parameter.device)
    if tensor.shape == parameter.shape and hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.removeprefix("module."), parameter) for name, parameter in model.named_parameters()]


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)

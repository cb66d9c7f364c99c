"""Content of a checkpoint: an ordinary HF GPT-2 folder with its tokenizer, plus the training state.

step_00000500/
  model.safetensors config.json generation_config.json tokenizer.json tokenizer_config.json
  training_state/  state.json  optimizer.safetensors  rng_0.safetensors ...
  COMPLETE         sha256 of each file, written last, before the folder gets its name
"""

import copy
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from data_prep.common.command_line import UserError, first_line, listed
from data_prep.common.files import file_hash
from modeling import GPTModel
from modeling.import_checkpoint import bare_name
from training.checkpointing.store import COMPLETE, STATE, RunState, checkpoint_folder, is_checkpoint, remove_checkpoint


@dataclass(frozen=True)
class Snapshot:
    """Content of a checkpoint, in memory that training does not touch.

    Attributes:
        meta_model: a model without weights, which knows the format on disk.
        random: random number generators' states of each rank.
        tokenizer: its files, read when the run began: the data folder may be gone by now.
    """

    meta_model: GPTModel
    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    random: list[dict[str, Tensor]]
    state: RunState
    tokenizer: dict[str, bytes]


def take_snapshot(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    tokenizer: dict[str, bytes],
) -> Snapshot | None:
    """Copies the content of a checkpoint. Collective. Returns None on other ranks."""
    bare_model = accelerator.unwrap_model(model)
    if accelerator.is_fsdp2:
        weights = accelerator.get_state_dict(model)
        for tied in bare_model.all_tied_weights_keys:  # of each a sharded model gives a copy
            weights.pop(tied, None)
    else:
        weights = dict(bare_model.named_parameters())
    weights = {bare_name(name): tensor for name, tensor in weights.items()}
    main = accelerator.is_main_process
    optimizer_state = optimizer_tensors(model, optimizer, copied=main)
    random = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    random_of_ranks = gather_object([random])
    if not main:
        return None
    if accelerator.scaler is not None:
        state.grad_scaler = accelerator.scaler.state_dict()
    with torch.device("meta"):
        meta_model = GPTModel(bare_model.config)
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
    return Snapshot(meta_model, weights, optimizer_state, random_of_ranks, copy.deepcopy(state), tokenizer)


def write_checkpoint(snapshot: Snapshot, checkpoints: Path) -> Path:
    """Writes `step_NNNNNNNN` in `checkpoints`: under a temporary name, with its hashes in the sentinel `COMPLETE`,
    flushed to the disk, then renamed. A failed attempt leaves nothing behind.

    Raises:
        UserError: if something else has that name.
        ValueError: if the weights in the file are not those of the model, by name, shape or value.
    """
    folder = checkpoint_folder(checkpoints, snapshot.state.step)
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    if os.path.lexists(folder) and not is_checkpoint(folder):
        raise UserError(f"{folder} is in the way: it was not made by this program (no {COMPLETE}); move it")
    try:
        (partial / STATE).mkdir(parents=True)
        for name, content in snapshot.tokenizer.items():  # first: no file of the data replaces one of ours
            (partial / name).write_bytes(content)
        snapshot.meta_model.save_pretrained(partial, state_dict=dict(snapshot.weights))  # which it empties
        _check_weights(partial, snapshot.meta_model, snapshot.weights)
        for rank, random in enumerate(snapshot.random):
            save_file(random, partial / STATE / f"rng_{rank}.safetensors")
        save_file(snapshot.optimizer_state, partial / STATE / "optimizer.safetensors")
        state = json.dumps(asdict(snapshot.state), allow_nan=False)
        (partial / STATE / "state.json").write_text(state + "\n", encoding="utf-8")
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        hashes = {str(path.relative_to(partial)): file_hash(path) for path in files}
        (partial / COMPLETE).write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
        for path in (*partial.rglob("*"), partial):
            if path.suffix == ".safetensors":  # written without rights for others
                path.chmod((partial / STATE / "state.json").stat().st_mode)
            _flush(path)
        if is_checkpoint(folder):  # of the run before a rollback
            remove_checkpoint(folder)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(checkpoints)
    return folder


def _check_weights(folder: Path, meta_model: GPTModel, weights: dict[str, Tensor]) -> None:
    """Reads the weights of a checkpoint back; raises `ValueError` unless they are exactly the model's, by name, shape
    and value."""
    expected = {name: tensor.shape for name, tensor in meta_model.state_dict().items()}
    for tied in meta_model.all_tied_weights_keys:
        del expected[tied]
    problems = []
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118  it is no dict
                tensor, shape = saved.get_tensor(name), expected.pop(name, None)
                if shape is None:
                    problems.append(f"{name} is unknown")
                elif shape != tensor.shape:
                    problems.append(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
                elif not torch.equal(tensor.view(torch.uint8), weights[name].view(torch.uint8)):
                    problems.append(f"{name} is not as in memory")
    if problems := [*problems, *(f"{name} is missing" for name in expected)]:
        raise ValueError(f"the weights that were written are not those of the model: {listed(sorted(problems))}")


def _flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_training_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState, folder: Path
) -> None:
    """Restores optimizer, loss scale and random states. `GPTModel.from_pretrained` loads the weights."""
    try:
        tensors = load_file(folder / STATE / "optimizer.safetensors")
        # Before the first update it is empty. A skipped batch makes no update, nor does an overflow by which the loss
        # scale of fp16 finds its size.
        if tensors or (state.step > len(state.skipped) and not state.grad_scaler):
            restore_optimizer(model, optimizer, tensors)
        # A rank that the saved run did not have keeps its own seed.
        random_state = folder / STATE / f"rng_{accelerator.process_index}.safetensors"
        if random_state.exists():
            random = load_file(random_state)
            torch.set_rng_state(random["cpu"])
            if accelerator.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], accelerator.device)
        if accelerator.scaler is not None and state.grad_scaler:
            accelerator.scaler.load_state_dict(state.grad_scaler)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder}: cannot be resumed from ({first_line(error)})") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, copied: bool = True) -> dict[str, Tensor]:
    """Optimizer state as full tensors named `PARAMETER/KEY`, such as `transformer.wte.weight/exp_avg`.

    Args:
        copied: onto the CPU. Ranks that do not keep the result still take part in gathering a sharded model.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if copied:
                tensors[f"{bare_name(name)}/{key}"] = full.detach().to("cpu", copy=True).contiguous()
    return tensors


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores the tensors of `optimizer_tensors`, sharded like the parameters. Raises `ValueError` naming tensors that
    are missing, unknown or of the wrong shape."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    wanted = {
        f"{bare_name(name)}/{key}": (parameter, key)
        for name, parameter in model.named_parameters()
        for key in groups[id(parameter)]["state_keys"]
    }
    problems = [f"{name} is missing" for name in wanted.keys() - tensors.keys()]
    problems += [f"{name} is unknown" for name in tensors.keys() - wanted.keys()]
    for name in wanted.keys() & tensors.keys():
        parameter, key = wanted[name]
        shape = torch.Size() if key == "step" else parameter.shape
        if tensors[name].shape != shape or not tensors[name].is_floating_point():
            problems.append(
                f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}, expected {list(shape)} floats"
            )
    if problems:
        raise ValueError(f"optimizer.safetensors: {listed(sorted(problems))}")
    for name, (parameter, key) in wanted.items():
        tensor = tensors[name].to(parameter.device)
        if isinstance(parameter, DTensor) and key != "step":
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        optimizer.state[parameter][key] = tensor

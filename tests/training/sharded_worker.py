"""One of two gloo processes that train a model sharded over them by FSDP2; started by test_sharded.py.

    torchrun --nproc_per_node 2 sharded_worker.py FOLDER STEPS OPTIMIZER ...

Half-way the weights and the optimizer are saved, and a second model goes on from there beside the first.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny import batches, make_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from modeling import GPTModel
from training.checkpoint import optimizer_tensors, restore_optimizer
from training.optimizer import make_optimizer
from training.settings import OptimizerSettings


def shard(model: GPTModel) -> GPTModel:
    """As Accelerate does under accelerate_configs/fsdp2.yaml: each block, and the whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: GPTModel, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    half = len(batch["input_ids"]) // 2
    mine = {name: tensor[dist.get_rank() * half :][:half] for name, tensor in batch.items()}
    loss = model(**mine, use_cache=False, skip_logits=True).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def main(folder: Path, steps: int, kind: str) -> None:
    settings = OptimizerSettings(optimizer=kind, learning_rate=1e-2)
    model = shard(make_model())
    optimizer = make_optimizer(model, settings)
    assert all(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    data = batches(steps)
    losses = [step(model, optimizer, batch) for batch in data[: steps // 2]]

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    moments = optimizer_tensors(model, optimizer)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=weights)
        save_file(moments, folder / "optimizer.safetensors")
    dist.barrier()
    second = shard(GPTModel.from_pretrained(folder, dtype=torch.float32).train())
    second_optimizer = make_optimizer(second, settings)
    restore_optimizer(second, second_optimizer, load_file(folder / "optimizer.safetensors"))

    rest = [(step(model, optimizer, b), step(second, second_optimizer, b)) for b in data[steps // 2 :]]
    if dist.get_rank() == 0:
        result = {"losses": losses + [first for first, _ in rest], "resumed": losses + [last for _, last in rest]}
        (folder / "losses.json").write_text(json.dumps(result))
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for optimizer in sys.argv[3:]:
        main(Path(sys.argv[1]) / optimizer, int(sys.argv[2]), optimizer)
    dist.destroy_process_group()

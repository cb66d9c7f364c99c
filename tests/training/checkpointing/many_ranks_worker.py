"""One rank of many, whose collectives do nothing: shapes and divisibility at sizes that no test machine has.

python many_ranks_worker.py RANK/WORLD_SIZE ...
"""

import os
import sys

import torch
from accelerate.state import AcceleratorState
from plants import sharded
from tiny import batches, make_model
from torch.testing._internal.distributed.fake_pg import FakeStore


def check(rank: int, world_size: int) -> None:
    from eval.common import devices
    from training.checkpointing.checkpoint import optimizer_tensors, restore_optimizer
    from training.engine.optimizer import make_optimizer
    from training.engine.step import training_step
    from training.settings.schema import OptimizerSettings

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # where nobody is
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    for kind in ("adamw", "muon"):
        accelerator = devices.make_accelerator()
        assert accelerator.num_processes == world_size and accelerator.process_index == rank
        model = make_model()
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        on_disk = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model, optimizer = accelerator.prepare(model, make_optimizer(model, OptimizerSettings(optim=kind)))
        for name, parameter in model.named_parameters():
            rows = -(-shapes[name][0] // world_size)  # of a rank, as long as there are any
            mine = min(max(shapes[name][0] - rank * rows, 0), rows)
            assert parameter.to_local().shape == (mine, *shapes[name][1:]), name
        training_step(accelerator, model, optimizer, batches(1), max_grad_norm=1.0)
        saved = optimizer_tensors(model, optimizer)
        assert all(tensor.shape in ((), shapes[name.rpartition("/")[0]]) for name, tensor in saved.items())
        restore_optimizer(model, optimizer, saved)
        weights = accelerator.get_state_dict(model)
        if rank == 0:
            assert {name: tensor.shape for name, tensor in weights.items()} == on_disk
        accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sharded()
    for pair in sys.argv[1:]:
        check(*map(int, pair.split("/")))

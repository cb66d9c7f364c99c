"""One of two gloo processes that run training steps as Accelerate prepares it; started by test_sharded.py.

    torchrun --nproc_per_node 2 sharded_worker.py RESULTS.json

What is found for each strategy, optimizer and precision is written there.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch._inductor.compile_fx
from accelerate.state import AcceleratorState
from plants import sharded
from tiny import STEPS, batches, make_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from eval.common import devices
from eval.common.models import compile_blocks
from training.engine.optimizer import make_optimizer, share_work
from training.engine.step import training_step
from training.settings.schema import OptimizerSettings


class Collectives(TorchDispatchMode):
    """How often each collective is called. (torch's CommDebugMode follows modules as well, and falls over FSDP2's.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it will be back, as what it is made of
        if "c10d" in function.namespace and not any(word in function.__name__ for word in ("wait", "wrap")):
            self.counts[function.__name__.partition(".")[0].strip("_")] += 1
        return function(*args, **(kwargs or {}))


def rows(batch: dict[str, torch.Tensor], rank: int) -> list[dict[str, torch.Tensor]]:
    """This process's half, in two micro-batches."""
    mine = {name: tensor.chunk(2)[rank] for name, tensor in batch.items()}
    return [{name: tensor.chunk(2)[part] for name, tensor in mine.items()} for part in range(2)]


def found(strategy: str, kind: str, precision: str, compiled: bool = False) -> dict:
    """Losses over some steps, the collectives of the last one by name, and the dtypes that things have."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = devices.make_accelerator(mixed_precision=precision, timeout=1234)
    model = make_model()
    if compiled:
        compile_blocks(model)
    optimizer = make_optimizer(model, OptimizerSettings(optim=kind, learning_rate=1e-2), precision)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(model, FSDPModule) == (strategy == "fsdp2")
    losses = []
    for batch in batches(STEPS):
        with Collectives() as collectives:
            results = training_step(accelerator, model, optimizer, rows(batch, accelerator.process_index), 1.0)
        losses.append(accelerator.reduce(results["loss"], reduction="mean").item())

    with accelerator.no_sync(model), Collectives() as alone:  # as in the search for the micro-batch
        share_work(optimizer, strategy == "fsdp2")
        training_step(accelerator, model, optimizer, rows(batch, 0)[:1], 1.0)
        share_work(optimizer, True)
    with accelerator.no_sync(model):  # gradients that are still to be added to
        outputs = model(**rows(batches(1)[0], accelerator.process_index)[0], use_cache=False)
        outputs.loss.backward()
        accumulated = accumulated_dtypes(model)
    nats = accelerator.unwrap_model(model).token_losses(**rows(batches(1)[0], 0)[0])
    group = torch.distributed.distributed_c10d._get_default_group()
    return {
        "losses": losses,
        "timeout": group._get_backend(accelerator.device).options._timeout.total_seconds(),
        "collectives": collectives.counts,
        "alone": alone.counts,
        "loss": str(outputs.loss.dtype),
        "hellaswag": str(nats.dtype),
        "logits": str(model.eval()(**rows(batches(1)[0], 0)[0], use_cache=False).logits.dtype),
        "accumulated": sorted({str(dtype) for dtype in accumulated}),
        "matrices": sum(1 for name, p in model.named_parameters() if ".h." in name and p.dim() == 2),
    }


def accumulated_dtypes(model: torch.nn.Module) -> list[torch.dtype]:
    if not isinstance(model, FSDPModule):
        return [parameter.grad.dtype for parameter in model.parameters()]
    return [
        (parameter.unsharded_param.grad if gradient is None else gradient).dtype
        for module in model.modules()
        if isinstance(module, FSDPModule) and (group := module._get_fsdp_state()._fsdp_param_group) is not None
        for parameter in group.fsdp_params
        for gradient in [parameter.unsharded_accumulated_grad]
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    asks_for_fsdp = os.environ.pop("ACCELERATE_USE_FSDP")  # which is refused where there is none
    for strategy in ("ddp", "fsdp2"):
        if strategy == "fsdp2":
            os.environ["ACCELERATE_USE_FSDP"] = asks_for_fsdp
            sharded()
        for kind in ("adamw", "muon"):
            for precision in ("no", "bf16"):
                results[f"{strategy} {kind} {precision}"] = found(strategy, kind, precision)
    graphs = []
    torch._inductor.compile_fx.compile_fx = lambda graph, *_, **__: graphs.append(graph) or graph
    results["fsdp2 adamw no"]["compiled"] = found("fsdp2", "adamw", "no", compiled=True)["losses"]
    results["fsdp2 adamw no"]["graphs"] = len(graphs)
    if int(torch.distributed.get_rank()) == 0:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

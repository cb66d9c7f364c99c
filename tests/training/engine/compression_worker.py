"""One of two gloo processes that compress gradients, in several buckets; started by test_compression.py.

    torchrun --nproc_per_node 2 compression_worker.py RESULTS.json

What is found for each kind of compression is written there.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from tiny import batches, make_model
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, batched_powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from eval.common import devices
from training.checkpointing.power_sgd import file_of_rank, gather_tensors, power_sgd, restore_power_sgd
from training.engine.compression import compress_gradients
from training.engine.optimizer import make_optimizer
from training.engine.step import training_step
from training.settings.schema import DeviceSettings, OptimizerSettings

ROWS = batches(1)[0]


def prepared(kind: str, rank: int = 1):
    """A model of several buckets, with its compression, and an optimizer that changes nothing."""
    AcceleratorState._reset_state(reset_partial_state=False)
    small = DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=0.02)
    accelerator = devices.make_accelerator(mixed_precision="no", kwargs_handlers=[small])
    bare = make_model()
    optimizer = make_optimizer(bare, OptimizerSettings(optim="adamw", learning_rate=1e-2, weight_decay=0.0))
    model, optimizer = accelerator.prepare(bare, optimizer)
    settings = DeviceSettings(gradient_compression=kind)
    if kind == "power_sgd":
        settings.power_sgd_rank, settings.power_sgd_start_step = rank, 2
    if kind != "none":
        compress_gradients(model, settings, mine(accelerator)[0], accelerator.device)
    return accelerator, model, optimizer


def mine(accelerator: Accelerator) -> list[dict[str, torch.Tensor]]:
    """This process's half, in two micro-batches."""
    half = {name: tensor.chunk(2)[accelerator.process_index] for name, tensor in ROWS.items()}
    return [{name: tensor.chunk(2)[part] for name, tensor in half.items()} for part in range(2)]


def gradients(accelerator: Accelerator, model: DistributedDataParallel) -> dict[str, torch.Tensor]:
    """The gradients of a step, as the processes exchange them."""
    first, second = mine(accelerator)
    with model.no_sync():
        (model(**first, use_cache=False).loss / 2).backward()
    (model(**second, use_cache=False).loss / 2).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.module.named_parameters()}
    model.zero_grad()
    return found


def relative(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference, as a part of its tensor's largest number."""
    return max(((found[n] - e).abs().max() / e.abs().max()).item() for n, e in expected.items())


def mean_errors(accelerator: Accelerator, model: DistributedDataParallel) -> dict[str, torch.Tensor]:
    """What has not been sent yet, by parameter."""
    state, names = power_sgd(model), [name for name, _ in model.module.named_parameters()]
    found = {}
    for bucket, error in state.error_dict.items():
        left = accelerator.reduce(error.clone(), reduction="mean")
        for index in state.buckets[bucket]:
            parameter = list(state.indices)[index]
            found[names[index]] = left[: parameter.numel()].view_as(parameter)
            left = left[parameter.numel() :]
    return found


def found_power_sgd(plain: dict[str, torch.Tensor], rank: int) -> dict:
    accelerator, model, _ = prepared("power_sgd", rank)
    first = [gradients(accelerator, model) for _ in range(2)]
    sent = [gradients(accelerator, model) for _ in range(5)]
    left = mean_errors(accelerator, model)
    total = {name: sum(step[name] for step in sent) + left[name] for name in plain}
    matrices = [g for n, g in sent[-1].items() if g.dim() == 2 and "wpe" not in n]
    return {
        "buckets": len(power_sgd(model).buckets),
        "before": relative(first[-1], plain),
        "differs": relative(sent[-1], plain),
        "sent and left": relative(total, {name: 5 * g for name, g in plain.items()}),
        "ranks": sorted({int(torch.linalg.matrix_rank(matrix, rtol=1e-4)) for matrix in matrices}),
    }


def restored(folder: Path) -> dict:
    """The next step of a model that got the state from files, of as many processes and of another number."""
    accelerator, model, _ = prepared("power_sgd")
    for _ in range(4):
        gradients(accelerator, model)
    ranks = gather_tensors(accelerator, power_sgd(model).tensors())
    for number, tensors in enumerate(ranks):
        for ending in ("same", "other"):
            (folder / ending).mkdir(exist_ok=True)
            save_file(tensors, file_of_rank(folder / ending, number))
    if ranks:  # a third process, whose errors are the mean of the two
        third = {name: (t + ranks[1][name]) / 2 if "error" in name else t for name, t in ranks[0].items()}
        save_file(third, file_of_rank(folder / "other", 2))
    accelerator.wait_for_everyone()
    expected = gradients(accelerator, model)
    results = {}
    for ending in ("same", "other", "none"):
        accelerator, model, _ = prepared("power_sgd")
        restore_power_sgd(power_sgd(model), accelerator, folder / ending, 4)
        found = gradients(accelerator, model)
        same = all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        results[ending] = {"equal": same, "differs": relative(found, expected), "iteration": power_sgd(model).iter}
    state = power_sgd(model)
    state.buckets[1].reverse()
    try:
        restore_power_sgd(state, accelerator, folder / "same", 4)
    except ValueError as error:
        results["another order"] = str(error)
    return results


def after_nan(rank: int) -> dict:
    """A step whose gradients are not finite on one process, and the one after it."""
    accelerator, model, optimizer = prepared("power_sgd", rank)
    losses = []
    for step in range(8):
        if step == 5:
            before = power_sgd(model).tensors()
            handle = model.module.register_forward_hook(break_loss) if accelerator.process_index == 1 else None
        results = training_step(accelerator, model, optimizer, mine(accelerator), 1.0)
        losses.append(accelerator.reduce(results["loss"], reduction="mean").item())
        if step == 5:
            finite = bool(results["grad_norm"].isfinite())
            after = power_sgd(model).tensors()
            kept = all(torch.equal(after[name], t) for name, t in before.items() if "p_memory" not in name)
            if handle is not None:
                handle.remove()
    return {"finite": finite, "kept": kept, "losses": losses}


def break_loss(module: torch.nn.Module, arguments: tuple, output) -> object:
    output.loss = output.loss * float("inf")
    return output


def batched() -> str:
    """The error of torch's other PowerSGD hook."""
    model = DistributedDataParallel(make_model())
    model.register_comm_hook(PowerSGDState(None, start_powerSGD_iter=2), batched_powerSGD_hook)
    try:
        for _ in range(3):
            model(**ROWS, use_cache=False).loss.backward()
    except AssertionError as error:
        return repr(error)
    return "none"


if __name__ == "__main__":
    torch.set_num_threads(1)
    file = Path(sys.argv[1])
    accelerator, model, _ = prepared("none")
    gradients(accelerator, model)  # after it DDP has several buckets
    plain = gradients(accelerator, model)
    results = {}
    for kind in ("fp16", "bf16"):
        accelerator, model, _ = prepared(kind)
        gradients(accelerator, model)
        results[kind] = relative(gradients(accelerator, model), plain)
    for rank in (1, 4):
        results[f"power_sgd {rank}"] = found_power_sgd(plain, rank)
        results[f"nan {rank}"] = after_nan(rank)
    results["restored"] = restored(file.parent)
    results["batched"] = batched()
    if accelerator.is_main_process:
        file.write_text(json.dumps(results, indent=1))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

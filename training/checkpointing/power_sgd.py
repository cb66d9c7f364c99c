"""The state of PowerSGD's gradient compression (arXiv:1905.13727), which checkpoints keep for each process.

PowerSGD sends two thin matrices P and Q in place of each matrix of gradients. What they leave out, the error, is added
to the next gradient.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import recv, send
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")  # tensors of PowerSGDState, by bucket
_SEED = 0


class PowerSGD(PowerSGDState):
    """The state of torch's hook, which can be saved and restored.

    Attributes:
        indices: of the model's parameters.
        buckets: indices of the parameters in each bucket of DDP, in the order in which their gradients lie there.
    """

    def __init__(self, model: nn.Module, rank: int, start_step: int) -> None:
        super().__init__(None, matrix_approximation_rank=rank, start_powerSGD_iter=start_step, random_seed=_SEED)
        self.indices: dict[Tensor, int] = {parameter: index for index, parameter in enumerate(model.parameters())}
        self.buckets: dict[int, list[int]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """The state of this process, named as `error_dict/0`. What a step changes in place is copied."""
        tensors = {"iteration_and_rank": torch.tensor([self.iter, self.matrix_approximation_rank])}
        tensors |= {f"parameters/{bucket}": torch.tensor(indices) for bucket, indices in self.buckets.items()}
        for name in _MEMORIES:
            for bucket, tensor in getattr(self, name).items():
                tensors[f"{name}/{bucket}"] = tensor if name == "error_dict" else tensor.clone()
        return tensors

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` returns. P and Q of another rank begin anew.

        Raises:
            KeyError: if there is no iteration.
            ValueError: for gradients in another order, or errors of another size.
        """
        iteration, rank = tensors["iteration_and_rank"].tolist()
        if {bucket: indices.tolist() for bucket, indices in _by_bucket(tensors, "parameters").items()} != self.buckets:
            raise ValueError(
                "PowerSGD's errors are of gradients in another order; resume with the torch_compile, "
                "gradient_checkpointing and torch that saved them"
            )
        parameters = list(self.indices)
        for bucket, error in _by_bucket(tensors, "error_dict").items():
            size = sum(parameters[index].numel() for index in self.buckets.get(bucket, ()))
            if error.shape != (size,):
                raise ValueError(f"error_dict/{bucket} is {list(error.shape)}, expected [{size}]")
        self.restart(iteration)
        device = parameters[0].device
        for name in _MEMORIES if rank == self.matrix_approximation_rank else ("error_dict",):
            # A copy: products round differently where memory is aligned differently, as that of a file is.
            setattr(self, name, {b: t.to(device, copy=True) for b, t in _by_bucket(tensors, name).items()})

    def restart(self, iteration: int) -> None:
        """Forgets errors, P and Q."""
        self.iter = iteration
        self.rng = np.random.RandomState(_SEED)  # used once, for the first Q of each bucket
        for name in _MEMORIES:
            setattr(self, name, {})


def _by_bucket(tensors: dict[str, Tensor], kind: str) -> dict[int, Tensor]:
    return {int(name.removeprefix(f"{kind}/")): t for name, t in tensors.items() if name.startswith(f"{kind}/")}


def power_sgd(model: nn.Module) -> PowerSGD | None:
    """The state of the model's PowerSGD hook, if it has one."""
    hooks: Any = getattr(model, "_comm_hooks", ())
    return next((state for _, state in hooks if isinstance(state, PowerSGD)), None)


def gather_tensors(accelerator: Accelerator, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Copies on the CPU of the tensors of each rank, which have the same names and shapes. Collective. Returns an empty
    list on other ranks than the first.

    They are sent one by one: together they may not fit in the memory of a GPU.
    """
    if not accelerator.is_main_process:
        for tensor in tensors.values():
            send(tensor.to(accelerator.device), dst=0)
        return []
    ranks = [{name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}]
    for rank in range(1, accelerator.num_processes):
        received = {name: torch.empty_like(tensor) for name, tensor in ranks[0].items()}
        for tensor in received.values():
            buffer = tensor.to(accelerator.device)
            recv(buffer, src=rank)
            tensor.copy_(buffer)
        ranks.append(received)
    return ranks


def file_of_rank(folder: Path, rank: int) -> Path:
    """The file of a rank's state in the folder of a training state."""
    return folder / f"power_sgd_{rank}.safetensors"


def restore_power_sgd(compression: PowerSGD, accelerator: Accelerator, folder: Path, step: int) -> None:
    """Restores the state in the folder of a training state; without one, begins at `step`. Raises as `restore`.

    Another number of processes than before gets the mean error on each: P and Q are linear in the gradients, so that
    only the mean counts.
    """
    saved = [file_of_rank(folder, rank) for rank in range(len(list(folder.glob("power_sgd_*.safetensors"))))]
    if not saved:
        compression.restart(step)
    elif len(saved) == accelerator.num_processes:
        compression.restore(load_file(saved[accelerator.process_index]))
    else:
        tensors = load_file(saved[0])
        errors = [name for name in tensors if name.startswith("error_dict/")]
        for path in saved[1:]:
            others = load_file(path)
            for name in errors:
                tensors[name] += others[name]
        compression.restore(tensors | {name: tensors[name] / len(saved) for name in errors})

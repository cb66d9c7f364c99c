"""Failures that are planted in a training process before it starts."""

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.chmod", "os.scandir")


def on_event(kind: str, folder: Path, act: Callable[[], None]) -> None:
    """Call `act` whenever something is done to a file or folder under `folder`, or anything removed (`file`), or a
    module of the model has been traversed, in training or in evaluation (`forward`)."""
    import torch

    if kind == "forward":
        torch.nn.modules.module.register_module_forward_hook(lambda *_: act())
        return

    def hook(name: str, arguments: tuple) -> None:
        # What is removed within a folder is named by itself.
        if name in ("os.remove", "os.rmdir") or (name in _FILE_EVENTS and folder.name in str(arguments[0])):
            act()

    sys.addaudithook(hook)


def signalled(kind: str, count: int, folder: Path, what: signal.Signals = signal.SIGKILL) -> None:
    """Send `what` to this process at the `count`-th event."""
    left = count

    def act() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), what)

    on_event(kind, folder, act)


def signalled_in_evaluation(count: int, rank: int = 0) -> None:
    """Send SIGTERM to a rank at the `count`-th forward pass of an evaluation; exit with 98 at the next but one."""
    import torch

    from modeling import GPTModel

    left = count

    def act(module: torch.nn.Module, _: tuple) -> None:
        nonlocal left
        if isinstance(module, GPTModel) and not module.training:
            left -= 1
            if left == 0 and os.environ.get("RANK", "0") == str(rank):
                os.kill(os.getpid(), signal.SIGTERM)
            elif left < -1:
                os._exit(98)

    torch.nn.modules.module.register_module_forward_pre_hook(act)


def counted(folder: Path, report: Path) -> None:
    """Write down at the end how many events of each kind there were."""
    from multiprocessing.util import Finalize

    counts = dict.fromkeys(("file", "forward"), 0)

    def count(kind: str) -> Callable[[], None]:
        def act() -> None:
            counts[kind] += 1

        return act

    for kind in counts:
        on_event(kind, folder, count(kind))
    Finalize(None, lambda: report.write_text(json.dumps(counts)), exitpriority=1)


def bad_batch(sequence: list[int], factor: float, kind: str = "GPTMLP", number: int = 1) -> None:
    """Multiply what a module gives, the `number`-th of a kind, by `factor`, whenever a training batch has that sequence
    in it."""
    import torch

    met, seen = False, 0

    def hook(module: torch.nn.Module, arguments: tuple, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal met, seen
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings > len(sequence):  # that of tokens
            met, seen = module.training and bool((arguments[0] == torch.tensor(sequence)).all(dim=1).any()), 0
        elif type(module).__name__ == kind:
            seen += 1
            return output * factor if met and seen == number + 1 else None
        return None

    torch.nn.modules.module.register_module_forward_hook(hook)


def saves_that_fail(times: int) -> None:
    """The first N attempts to write a checkpoint throw; nobody waits for the next one."""
    from training.checkpointing import writer

    write, left = writer.write_checkpoint, times

    def fail(*arguments: object) -> Path:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("a bug of the writer")
        return write(*arguments)

    writer.write_checkpoint, writer._PAUSES = fail, (0, 0)


def in_step(step: int, rank: int, act: Callable[[], None]) -> None:
    """Call `act` on a rank, in its step of that number since the start."""
    from training import train

    left, original = step, train.training_step

    def stepping(*arguments: object) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            act()
        return original(*arguments)

    if os.environ.get("RANK", "0") == str(rank):
        train.training_step = stepping


def die() -> None:
    """End like a process that the system kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(checkpoint: Path) -> None:
    """The same, once that checkpoint is complete."""
    while not (checkpoint / "COMPLETE").exists():
        pass
    die()


def fail() -> None:
    """Meet an error that no other process does."""
    raise RuntimeError("the disk of this process is gone")


def run_out_of_memory() -> None:
    """Meet the error that torch raises when a device has no memory left."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more lines")


def rehash(checkpoint: Path, name: str) -> None:
    """Put the hash of a file that a test has changed into the sentinel: the problem is not the disk."""
    hashes = json.loads((checkpoint / "COMPLETE").read_text())
    hashes[name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    (checkpoint / "COMPLETE").write_text(json.dumps(hashes))


def online(then: Callable[[], None] | None = None) -> None:
    """Let a process that was forked from one without a network have the Hub of its environment; and then what else goes
    wrong."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE, constants.ENDPOINT = False, os.environ["HF_ENDPOINT"]
    if then is not None:
        then()


def no_network() -> None:
    """End the process when it looks for another machine."""
    import socket

    def leave(*arguments: object, **options: object) -> None:
        os._exit(97)

    socket.getaddrinfo = socket.socket.connect = leave


def wait_until_gone(port: int) -> None:
    """Return when nobody listens there any more."""
    import socket

    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return


def sharded() -> None:
    """Shard over processes of a CPU what $FSDP_* say, as Accelerate does over GPUs: on a CPU it silently would not."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

    from eval.common import devices

    class Sharding(Accelerator):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            PartialState().distributed_type = DistributedType.FSDP  # which the other states are copied from
            self.state.distributed_type = DistributedType.FSDP
            self.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            if self.mixed_precision != "no":  # as in `AcceleratorState`
                self.state.fsdp_plugin.set_mixed_precision(self.mixed_precision)

    devices.Accelerator = Sharding

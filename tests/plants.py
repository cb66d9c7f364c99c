"""What goes wrong in a training process, and when; put in place in that process before it trains."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.scandir")


def on_event(kind: str, folder: Path, act: Callable[[], None]) -> None:
    """Call `act` whenever something is done to a file or folder under `folder` (`file`), or a module of the model has
    been gone through, in training or in evaluation (`forward`)."""
    import torch

    if kind == "forward":
        torch.nn.modules.module.register_module_forward_hook(lambda *_: act())
        return

    def hook(name: str, arguments: tuple) -> None:
        if name in _FILE_EVENTS and isinstance(arguments[0], str | Path) and folder.name in str(arguments[0]):
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


def counted(folder: Path, report: Path) -> None:
    """Write down at the end how many events of each kind there were."""
    import json
    from multiprocessing.util import Finalize

    counts = dict.fromkeys(("file", "forward"), 0)

    def count(kind: str) -> Callable[[], None]:
        def act() -> None:
            counts[kind] += 1

        return act

    for kind in counts:
        on_event(kind, folder, count(kind))
    Finalize(None, lambda: report.write_text(json.dumps(counts)), exitpriority=1)

"""A profile of a few steps, by torch's profiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, schedule

_BEFORE, _RECORDED = 3, 3  # steps: compilation and allocation are over after the first


@contextmanager
def profiling(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Records steps 4 to 6 into `folder`: `trace.json.gz` for ui.perfetto.dev, and a table of operations.

    Args:
        folder: None for no profile.

    Yields:
        A function to call after each step.
    """
    if folder is None:
        yield lambda: None
        return

    def write(recorded: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(folder / "trace.json.gz"))
        device = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=device, row_limit=40)
        (folder / "operations.txt").write_text(table + "\n", encoding="utf-8")
        print(f"profile of {_RECORDED} steps in {folder}: trace.json.gz (open it at ui.perfetto.dev), operations.txt")

    steps = schedule(wait=_BEFORE - 1, warmup=1, active=_RECORDED, repeat=1)
    with profile(schedule=steps, on_trace_ready=write) as recording:
        yield recording.step

"""How OpenMP's threads wait for each other."""

import os

_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# Spins before a thread sleeps; libgomp's own limit is 300,000 with as many threads as cores. 10,000 are some tenths of
# a millisecond, enough for nearly all waits of a training step. Where another process takes a core, spinning takes it
# from the thread that is waited for.
_ALONE, _BESIDE_OTHERS = 10_000, 1_000
_SECONDS = 0.2  # of looking for other busy processes


def limit_spinning() -> None:
    """Makes OpenMP's threads sleep soon where they wait for each other, unless the environment says how they wait.

    By default they spin for milliseconds. libgomp reads the environment when it is loaded: call this before
    `import torch`. It looks once, for a moment, whether other processes keep the cores busy.
    """
    os.environ.update(spin_limit())


def spin_limit() -> dict[str, str]:
    """The environment variables that `limit_spinning` sets."""
    if any(os.environ.get(name) for name in _SETTINGS):
        return {}
    return {"GOMP_SPINCOUNT": str(_BESIDE_OTHERS if _others_are_busy() else _ALONE)}


def _others_are_busy() -> bool:
    """Whether fewer cores are idle than OpenMP will have threads, as far as can be seen."""
    import psutil

    try:
        loads = psutil.cpu_percent(interval=_SECONDS, percpu=True)
    except OSError:  # some containers do not let one read it; to sleep soon costs little, to spin may cost much
        return True
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(loads))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    wanted = int(threads) if threads.isdecimal() else len(cores)
    # Containers and machines with cores that are switched off may list others than the process has.
    idle = sum(1 - load / 100 for core, load in enumerate(loads) if core in cores)
    return idle < min(wanted, len(cores)) - 0.5

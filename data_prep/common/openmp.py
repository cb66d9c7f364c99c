"""How OpenMP's threads wait for each other."""

import os

_SPINS = 1000  # some microseconds; libgomp's own limit is 300,000 with as many threads as cores
_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning() -> None:
    """Makes OpenMP's threads sleep soon where they wait for each other, unless the environment says how they wait.

    By default they spin for milliseconds. Beside another busy process they so take the cores from the threads that they
    wait for. libgomp reads the environment when it is loaded: call this before `import torch`.
    """
    os.environ.update(spin_limit())


def spin_limit() -> dict[str, str]:
    """The environment variables that `limit_spinning` sets."""
    return {} if any(os.environ.get(name) for name in _SETTINGS) else {"GOMP_SPINCOUNT": str(_SPINS)}

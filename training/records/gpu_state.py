"""What an NVIDIA GPU says about itself."""

import contextlib

import torch


def read_gpu(device: torch.device) -> dict[str, float]:
    """Utilization in %, temperature in °C and power in W of an NVIDIA GPU, as far as the driver tells them.

    torch needs nvidia-ml-py for that.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return {}
    readings = {
        "gpu_utilization": lambda: float(torch.cuda.utilization(device)),
        "gpu_temperature": lambda: float(torch.cuda.temperature(device)),
        "gpu_power": lambda: torch.cuda.power_draw(device) / 1000,
    }
    found = {}
    for name, read in readings.items():
        with contextlib.suppress(Exception):  # each driver, and a missing library, has errors of its own
            found[name] = read()
    return found

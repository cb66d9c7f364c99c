"""The precision of a run: what was asked for, what the hardware is good at, and its peak."""

import os
import re

import torch

from eval.launch import on_cpu
from training.settings import TrainingConfig

# Dense tensor-core peaks at bf16 of the vendors' data sheets, in FLOP/s. A device that is not here has no known peak.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
}
# Those whose peak at fp8 is twice that of bf16.
_FP8_DEVICES = ("H100 PCIe", "H100 NVL", "H100", "H200", "B200", "L40S", "L4")


def chosen_precision(config: TrainingConfig) -> str:
    """The precision that the settings or else the launch file name; bf16 or none as the hardware likes, if neither."""
    if config.run.mixed_precision != "auto":
        return config.run.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return launched if launched != "no" else "bf16" if bf16_is_fast() else "no"


def fp8_is_available() -> bool:
    """Whether this process's device multiplies matrices in fp8."""
    return not on_cpu() and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


def bf16_is_fast() -> bool:
    """Whether this process's device is better at bf16 than at float32."""
    if not on_cpu():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """The device's peak at a precision, in FLOP/s; None for an unknown device or precision, never a guess."""
    name = next((name for name in _PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)), None)
    if name is None or mixed_precision not in ("bf16", "fp16", "fp8"):
        return None
    if mixed_precision == "fp8":
        return 2 * _PEAK_FLOPS[name] if name in _FP8_DEVICES else None
    return _PEAK_FLOPS[name]

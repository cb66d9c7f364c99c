"""The peak speed of devices, which the model FLOPs utilization (MFU) is measured against."""

import re

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


def peak_flops(device_name: str, mixed_precision: str) -> float | None:
    """The device's peak at a precision, in FLOP/s; None for an unknown device or precision, never a guess."""
    name = next((name for name in _PEAK_FLOPS if re.search(rf"\b{name}\b", device_name)), None)
    if name is None or mixed_precision not in ("bf16", "fp16"):
        return None
    return _PEAK_FLOPS[name]

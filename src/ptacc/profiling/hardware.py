"""What the hardware can do, and what is asked of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

PEAK_FLOPS: Mapping[str, float] = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Floating-point operations a second in bf16 and fp16, by the name of the device: matrix products without sparsity.

Source: NVIDIA's pages of these devices, such as https://www.nvidia.com/en-us/data-center/h100/, which give numbers with
sparsity, twice as large.
"""


def find_peak_flops(device: torch.device) -> float | None:
    """Return what a device can do in a second in bf16 or fp16; None where that is not known."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_host_memory() -> int | None:
    """Return the bytes that this process occupied at most; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_flop_counter() -> FlopCounterMode:
    """Count floating-point operations from here on."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    return counter

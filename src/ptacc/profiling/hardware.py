"""Peak FLOPS and peak memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping

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
"""Dense floating-point operations per second in bf16 and fp16, by the name of the device.

Source: NVIDIA's product pages, such as https://www.nvidia.com/en-us/data-center/h100/. They list numbers with
sparsity, which are twice as large.
"""


def peak_host_memory() -> int | None:
    """Return the peak memory of this process in bytes, None if the platform does not report it."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

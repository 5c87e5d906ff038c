"""What differs between types of devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptacc.errors import LaunchError

NEEDED = ("Event", "get_rng_state", "set_rng_state")
"""What ptacc uses of the module of a device, such as `torch.cuda`."""


def check_device(device: torch.device) -> None:
    """Raise `LaunchError` for a device whose module in torch lacks what ptacc uses, such as a TPU."""
    module = getattr(torch, device.type, None)
    missing = [name for name in NEEDED if not hasattr(module, name)]
    if device.type != "cpu" and missing:
        raise LaunchError(
            f"Accelerate selected a device of type {device.type!r}, which ptacc does not support: it needs "
            f"{', '.join(f'torch.{device.type}.{name}' for name in missing)}. Use CUDA, MPS or XPU, or train on the "
            "CPU with ACCELERATE_USE_CPU=true set in the environment."
        )


def widest_float(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device: float64, and float32 where it has none, as on MPS."""
    is_narrow = device.type == "mps"
    if device.type == "xpu":  # Intel's GPUs for clients have no float64
        is_narrow = not torch.xpu.get_device_properties(device).has_fp64
    return torch.float32 if is_narrow else torch.float64


class AsyncScalarReader:
    """Reads a scalar from a device without synchronising: the value may be some steps old."""

    def __init__(self, device: torch.device) -> None:
        self._is_on_host = device.type == "cpu"
        self._module: Any = None if self._is_on_host else torch.get_device_module(device)
        self._copied: Any = None
        self._host = torch.zeros((), dtype=widest_float(device), pin_memory=device.type == "cuda")
        self._view = self._host.numpy()
        self._source: Tensor | None = None
        self._divisor = 1.0

    def read(self, value: Tensor, divisor: float = 1.0) -> float | None:
        """Return the last value that was copied to the host, divided by its divisor; then start the next copy.

        None before the first copy, and while a copy is running. On the CPU, this is `value / divisor` itself.
        """
        if self._is_on_host:
            if self._source is not value:  # reading through a view runs no operation, but creating it does
                self._source, self._view = value, value.numpy()
            return float(self._view) / divisor
        if self._copied is not None and not self._copied.query():
            return None
        arrived = None if self._copied is None else float(self._view) / self._divisor
        self._host.copy_(value, non_blocking=True)
        self._divisor = divisor
        self._copied = self._module.Event()
        self._copied.record()
        return arrived

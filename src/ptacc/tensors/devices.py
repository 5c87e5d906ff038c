"""What differs between types of devices."""

from __future__ import annotations

import torch

from ptacc.errors import LaunchError

HOST = torch.device("cpu")
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

"""Where a run is executed: versions, device, processes and host."""

from __future__ import annotations

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from ptacc.types.protocols import AcceleratorProtocol


@functools.cache
def get_versions() -> dict[str, str]:
    """Return the versions that results depend on, to the last bit."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "accelerate": version("accelerate"),
    }


def describe_environment(accelerator: AcceleratorProtocol) -> dict[str, str]:
    """Return what executes a run, by name, as text."""
    device = accelerator.device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return {
        "device": f"{device}{name}",
        "processes": str(accelerator.num_processes),
        "precision": str(accelerator.mixed_precision),
        "ptacc": get_own_version(),
        **get_versions(),
        "platform": platform.platform(),
        "host": platform.node(),
        "process": str(os.getpid()),
    }


def get_own_version() -> str:
    """Return the version of ptacc."""
    try:
        return version("ptacc")
    except PackageNotFoundError:
        return "(not installed)"

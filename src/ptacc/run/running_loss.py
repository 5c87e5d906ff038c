"""The mean loss of a part of a run, without synchronising the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptacc.tensors.devices import widest_float


class RunningLoss:
    """Sums losses on their device, and reads their mean without synchronising.

    Attributes:
        items: Number of items since the last `reset`.
    """

    items: float

    def __init__(self, device: torch.device) -> None:
        self.items = 0.0
        self._host_sum: float | None = 0.0 if device.type == "cpu" else None
        if self._host_sum is None:
            self._module: Any = torch.get_device_module(device)
            self._sum = torch.zeros((), dtype=widest_float(device), device=device)
            self._copy = torch.zeros((), dtype=self._sum.dtype, device="cpu", pin_memory=device.type == "cuda")
            self._copied: Any = None
            self._copied_items = 0.0

    def add(self, loss: Tensor, items: float) -> None:
        """Add a mean over `items` items, a scalar on the device."""
        self.items += items
        if self._host_sum is not None:
            self._host_sum += loss.item() * items
        else:
            self._sum.add_(loss, alpha=items)

    def reset(self) -> None:
        """Leave the losses so far out of the means to come."""
        self.items = 0.0
        if self._host_sum is not None:
            self._host_sum = 0.0
        else:
            self._sum.zero_()

    def read(self) -> float | None:
        """Return the mean so far; on another device than the CPU, that of an earlier call.

        None before the first mean has arrived from the device, and while the next one is on its way.
        """
        if self._host_sum is not None:
            return self._host_sum / self.items
        if self._copied is not None and not self._copied.query():
            return None
        arrived = None if self._copied is None else self._copy.item() / self._copied_items
        self._copy.copy_(self._sum, non_blocking=True)
        self._copied_items = self.items
        self._copied = self._module.Event()
        self._copied.record()
        return arrived

"""Reading a number from the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class LateReader:
    """The value of a scalar on the device, as of the last step whose copy has arrived; nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        """Read from `device`."""
        self._is_on_host = device.type == "cpu"
        self._copied: torch.cuda.Event | None = None
        pin = device.type == "cuda"
        self._host = torch.zeros((), dtype=torch.float64, pin_memory=pin)
        self._view = self._host.numpy()
        self._seen: Tensor | None = None

    def read(self, value: Tensor) -> float:
        """Return the value if it is at hand, or what arrived last, and ask for the present one."""
        if self._is_on_host:
            if self._seen is not value:  # a view costs no operation, making one does
                self._seen, self._view = value, value.numpy()
            return float(self._view)
        if self._copied is None or self._copied.query():  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            arrived = float(self._view)
            self._host.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
            return arrived
        return 0.0

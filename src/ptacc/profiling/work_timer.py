"""The time that a rank spends in forward passes, in which it does not wait for other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

MOST_TIMED = 100
"""Forward passes that are timed for a record; the others count as much as their mean."""


class HostEvent:
    """A point in time on the host, with the methods of `torch.cuda.Event`."""

    seconds: float

    def record(self) -> None:
        """Record the present time."""
        self.seconds = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent) -> float:
        """Return the milliseconds from this event to another one."""
        return 1000 * (end_event.seconds - self.seconds)


class WorkTimer:
    """Times forward passes: from the start of a step, or the end of a backward pass, to the next backward pass.

    Ranks wait for each other in backward passes and updates, so that these take about as long on all of them.

    Args:
        device: The device. On CUDA its own time is measured, with events that do not synchronize it.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._timed: list[tuple[Any, Any]] = []  # events of either type
        self._start: Any = None
        self._passes = 0

    def start(self) -> None:
        """Start to time a forward pass, unless enough have been timed."""
        self._start = self._record() if len(self._timed) < MOST_TIMED else None

    def backward(self, compute: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run a backward pass, which ends a forward pass and is followed by the next one."""
        self._passes += 1
        if self._start is not None:
            self._timed.append((self._start, self._record()))
        compute(*args, **kwargs)
        self.start()

    def pop_seconds(self) -> float:
        """Return the time of the forward passes since the last call. The device must have completed them."""
        seconds = [start.elapsed_time(end) / 1000 for start, end in self._timed]
        total = self._passes * sum(seconds) / len(seconds) if seconds else 0.0
        self._timed, self._passes = [], 0
        return total

    def _record(self) -> Any:
        event: Any = HostEvent()
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

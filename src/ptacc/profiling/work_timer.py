"""The time that a rank spends in forward passes, in which it does not wait for other ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

MOST_TIMED = 100
"""Forward passes that are timed for a record; the others count as much as their mean."""


class TimingEvent(Protocol):
    """A point in time, as `torch.cuda.Event`."""

    def record(self) -> None:
        """Record the present time, on a GPU that of its queue."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Return the milliseconds from this event to another one."""
        ...


class HostEvent:
    """A point in time on the host."""

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
        is_cuda = device.type == "cuda"
        self._make_event: Callable[[], TimingEvent] = (
            partial(torch.cuda.Event, enable_timing=True) if is_cuda else HostEvent
        )
        self._timed: list[tuple[TimingEvent, TimingEvent]] = []
        self._start: TimingEvent | None = None
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

    def _record(self) -> TimingEvent:
        event = self._make_event()
        event.record()
        return event


def find_slowest(seconds: Sequence[float]) -> tuple[int, float]:
    """Return the index of the longest time, and its ratio to the mean.

    Example:
        >>> find_slowest([1.0, 1.0, 2.5, 1.5])
        (2, 1.6666666666666667)
    """
    slowest = max(range(len(seconds)), key=lambda rank: seconds[rank])
    mean = sum(seconds) / len(seconds)
    return slowest, seconds[slowest] / mean if mean else 1.0

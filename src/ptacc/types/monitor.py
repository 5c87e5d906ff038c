"""Which reported value to follow, and what counts as better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from ptacc.errors import OptionError
from ptacc.types.aliases import (
    Mode,
)
from ptacc.validation import check_at_least


@dataclass(frozen=True, slots=True)
class Monitor:
    """A handle for a value that is reported, declared once by whoever reports it and then passed about, not spelt.

    Args:
        name: The value's name, as in `EpochRecord.values()`.
        mode: Whether less or more is better.

    Example:
        >>> ACCURACY = Monitor("accuracy", mode="max")
        >>> ACCURACY.is_better(0.9, than=0.8)
        True
    """

    name: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise OptionError(f'Monitor({self.name!r}, mode={self.mode!r}): must be "min" or "max".')

    def is_better(self, value: float, than: float) -> bool:
        """Say whether `value` beats `than`. NaN never does; anything beats NaN."""
        if math.isnan(value):
            return False
        return math.isnan(than) or (value < than if self.mode == "min" else value > than)


def as_monitor(monitor: str | Monitor, mode: Mode = "min") -> Monitor:
    """Return the handle for `monitor`; a name takes `mode` along, a handle knows its own."""
    return monitor if isinstance(monitor, Monitor) else Monitor(monitor, mode)


@dataclass(frozen=True, slots=True)
class Best:
    """The best by a value that is reported: what `keep_best` keeps.

    Args:
        monitor: The value, by its name or handle.
        mode: Whether less or more is better; a handle knows that itself.
        count: How many, at least 1.
    """

    monitor: str | Monitor
    mode: Mode = "min"
    count: int = 1

    def __post_init__(self) -> None:
        check_at_least("Best", "count", self.count, 1)
        as_monitor(self.monitor, self.mode)

    @property
    def resolved_monitor(self) -> Monitor:
        """The value as a `Monitor`."""
        return as_monitor(self.monitor, self.mode)

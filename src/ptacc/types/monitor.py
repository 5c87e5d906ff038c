"""Monitors: a reported value, and whether a lower or a higher one is better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from ptacc.errors import OptionError
from ptacc.types.aliases import Mode
from ptacc.validation import check_at_least


@dataclass(frozen=True, slots=True)
class Monitor:
    """A reported value to monitor. Define it once, next to the code that reports the value, and pass it around.

    Args:
        name: The value's name, as in `EpochRecord.values()`.
        mode: Whether the best value is the lowest (`"min"`) or the highest (`"max"`).

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
        """Return whether `value` is better than another one. NaN is worse than any number."""
        if math.isnan(value):
            return False
        return math.isnan(than) or (value < than if self.mode == "min" else value > than)


@dataclass(frozen=True, slots=True)
class ValueNames:
    """The names of the values that a run may report.

    Args:
        declared: Names that are known at the start. A metric with several values reports `name/key` instead.
        eval_sets: Names of the evaluation sets, empty for a single set without a name.
        allow_logged: Whether steps may log further values.

    Example:
        >>> names = ValueNames(frozenset({"train_loss", "eval_loss", "f1"}), frozenset({""}), allow_logged=False)
        >>> names.allow("f1/0"), names.allow("kl")
        (True, False)
    """

    declared: frozenset[str]
    eval_sets: frozenset[str]
    allow_logged: bool

    def allow(self, name: str) -> bool:
        """Return whether the run declares a value of this name, or may report one that it does not declare."""
        if name in self.declared or any(name.startswith(f"{known}/") for known in self.declared):
            return True
        prefixes = ["train/", *(f"{eval_set}/" if eval_set else "" for eval_set in self.eval_sets)]
        return self.allow_logged and name.startswith(tuple(prefixes))


def as_monitor(monitor: str | Monitor, mode: Mode = "min") -> Monitor:
    """Return the monitor of a name and `mode`. A monitor is returned as it is, with its own mode."""
    return monitor if isinstance(monitor, Monitor) else Monitor(monitor, mode)


@dataclass(frozen=True, slots=True)
class Best:
    """Which checkpoints `keep_best` keeps: the best ones by a reported value.

    Args:
        monitor: The value's name, or a `Monitor`.
        mode: Whether the best value is the lowest or the highest. Unused if `monitor` is a `Monitor`.
        count: Number of checkpoints to keep, at least 1.
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

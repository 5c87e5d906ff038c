"""Ratios of neighbours, and how sure they are: pure functions of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A median with the interval that holds it in 95 of 100 resamplings.

    Args:
        median: The median.
        low: The interval's lower end.
        high: Its upper end.
    """

    median: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median of some values with its bootstrap interval, always the same for the same values.

    Example:
        >>> estimate([1.0, 1.0, 1.0])
        Estimate(median=1.0, low=1.0, high=1.0)
    """
    drawn = np.random.default_rng(0).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Estimate(float(np.median(values)), float(low), float(high))

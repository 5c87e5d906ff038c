"""Medians with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A median with its 95 % bootstrap interval.

    Args:
        median: The median.
        low: The lower end of the interval.
        high: The upper end of the interval.
    """

    median: float
    low: float
    high: float


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median of some values with its bootstrap interval. The result is deterministic.

    Example:
        >>> estimate([1.0, 1.0, 1.0])
        Estimate(median=1.0, low=1.0, high=1.0)
    """
    resampled = np.random.default_rng(0).choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return Estimate(float(np.median(values)), float(low), float(high))

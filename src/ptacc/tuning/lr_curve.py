"""The curve of losses over learning rates: smoothing it, finding its steepest fall, and detecting divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

KERNEL_WIDTH = 1 / 40
"""Standard deviation of the smoothing kernel, as a fraction of the curve's length."""
MIN_POINTS = 10
"""With fewer points, nothing is suggested."""
MIN_FALL = 3.0
"""The smallest fall that counts, in multiples of the noise."""


def smoothed(losses: Sequence[float]) -> tuple[float, ...]:
    """Smooth losses by a Gaussian kernel around each of them.

    A running mean over earlier losses would lag behind, and show each loss at a later rate.

    Example:
        >>> [round(loss, 2) for loss in smoothed([1.0, 1.0, 4.0, 1.0, 1.0])]
        [1.23, 1.77, 2.21, 1.77, 1.23]
    """
    width = max(1.0, len(losses) * KERNEL_WIDTH)
    radius = math.ceil(3 * width)
    weights = np.exp(-((np.arange(-radius, radius + 1) / width) ** 2) / 2)
    sums, totals = (np.convolve(values, weights)[radius:-radius] for values in (losses, np.ones(len(losses))))
    return tuple((sums / totals).tolist())


def find_steepest(losses: Sequence[float]) -> int | None:
    """Return the index of the steepest fall of the smoothed losses before their minimum; None without a clear fall.

    Example:
        >>> find_steepest([2.0] * 20 + [2.0 - 0.1 * i for i in range(15)] + [0.5, 3.0, 9.0]) in range(20, 35)
        True
        >>> print(find_steepest([2.0, 2.1] * 20))
        None
    """
    if len(losses) < MIN_POINTS:
        return None
    curve = smoothed(losses)
    lowest = min(range(len(curve)), key=curve.__getitem__)
    # The median ignores diverging losses, which are far from any smooth curve.
    noise = sorted(abs(loss - mean) for loss, mean in zip(losses, curve, strict=True))[len(losses) // 2]
    if lowest == 0 or max(curve[:lowest]) - curve[lowest] <= MIN_FALL * noise:
        return None
    return min(range(1, lowest + 1), key=lambda i: curve[min(i + 1, lowest)] - curve[i - 1])


class DivergenceDetector:
    """Detects that the running mean of losses rises above its minimum by more than `max_rise`.

    Losses may be below zero, so a rise is measured in units of the first loss, or of the fall since then if larger.
    """

    def __init__(self, max_rise: float) -> None:
        self._max_rise = max_rise
        self._mean = self._first = self._lowest = math.nan

    def add(self, loss: float) -> bool:
        """Add a loss, and return whether the losses diverge.

        Example:
            >>> detector = DivergenceDetector(max_rise=3.0)
            >>> [detector.add(loss) for loss in (-1.0, -1.1, -0.9, -0.5, 20.0)]
            [False, False, False, False, True]
        """
        if math.isnan(self._mean):
            self._mean = self._first = self._lowest = loss
        self._mean = 0.8 * self._mean + 0.2 * loss
        self._lowest = min(self._lowest, self._mean)
        unit = max(abs(self._first), self._first - self._lowest)
        return not math.isfinite(loss) or self._mean - self._lowest > self._max_rise * unit

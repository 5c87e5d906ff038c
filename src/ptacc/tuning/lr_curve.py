"""The curve of losses over learning rates: how it is smoothed, where it has gone astray, and where it falls."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH = 1 / 40
"""Standard deviation of the smoothing kernel, as a part of the curve's length."""
FEWEST = 10
"""Points below which nothing is suggested."""
CLEAR = 3.0
"""A fall is one where it is this many times the noise."""


def geometric(first: float, last: float, count: int) -> tuple[float, ...]:
    """Return `count` numbers from `first` to `last`, each the same multiple of the one before.

    Example:
        >>> [round(rate, 3) for rate in geometric(0.001, 10.0, 5)]
        [0.001, 0.01, 0.1, 1.0, 10.0]
    """
    return tuple(first * (last / first) ** (i / (count - 1)) for i in range(count))


def smoothed(losses: Sequence[float]) -> tuple[float, ...]:
    """Smooth losses by a Gaussian kernel around each, so that the curve is not moved to the right.

    A running mean, which knows what is behind it alone, lags: it shows what the loss was several rates ago.

    Example:
        >>> [round(loss, 2) for loss in smoothed([1.0, 1.0, 4.0, 1.0, 1.0])]
        [1.23, 1.77, 2.21, 1.77, 1.23]
    """
    width = max(1.0, len(losses) * WIDTH)
    reach = math.ceil(3 * width)
    weights = [math.exp(-((i / width) ** 2) / 2) for i in range(reach + 1)]
    means = []
    for place in range(len(losses)):
        near = range(max(0, place - reach), min(len(losses), place + reach + 1))
        total = sum(weights[abs(i - place)] for i in near)
        means.append(sum(weights[abs(i - place)] * losses[i] for i in near) / total)
    return tuple(means)


def steepest(losses: Sequence[float]) -> int | None:
    """Return where the smoothed losses fall fastest on the way to their lowest; None where they do not clearly fall.

    Example:
        >>> steepest([2.0] * 20 + [2.0 - 0.1 * i for i in range(15)] + [0.5, 3.0, 9.0]) in range(20, 35)
        True
        >>> steepest([2.0, 2.1] * 20) is None
        True
    """
    if len(losses) < FEWEST:
        return None
    curve = smoothed(losses)
    lowest = min(range(len(curve)), key=curve.__getitem__)
    # The median, since losses that run away are far from any curve.
    noise = sorted(abs(loss - mean) for loss, mean in zip(losses, curve, strict=True))[len(losses) // 2]
    if lowest == 0 or max(curve[:lowest]) - curve[lowest] <= CLEAR * noise:
        return None
    return min(range(1, lowest + 1), key=lambda i: curve[min(i + 1, lowest)] - curve[i - 1])


class DivergenceDetector:
    """Follows losses as they come, to see where they run away.

    Losses may be below zero, so what they rise by is measured by how large they were at first and how far they fell.

    Args:
        max_rise: How far they may rise above their lowest.
    """

    DECAY = 0.8

    def __init__(self, max_rise: float) -> None:
        """Have seen nothing."""
        self._max_rise = max_rise
        self._mean = self._first = self._lowest = math.nan

    def has_run_away(self, loss: float) -> bool:
        """Take a loss in, and say whether they have run away.

        Example:
            >>> watch = DivergenceDetector(max_rise=3.0)
            >>> [watch.has_run_away(loss) for loss in (-1.0, -1.1, -0.9, -0.5, 20.0)]
            [False, False, False, False, True]
        """
        if math.isnan(self._mean):
            self._mean = self._first = self._lowest = loss
        self._mean = self.DECAY * self._mean + (1 - self.DECAY) * loss
        self._lowest = min(self._lowest, self._mean)
        scale = max(abs(self._first), self._first - self._lowest)
        return not math.isfinite(loss) or self._mean - self._lowest > self._max_rise * scale

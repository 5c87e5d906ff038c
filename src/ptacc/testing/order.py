"""The order in which a run goes through its data."""

from __future__ import annotations

from ptacc.rng import permutation


def epoch_order(seed: int, epoch: int, n: int) -> list[int]:
    """Return the order in which a run shuffles `n` samples in an epoch, counted from 0.

    Example:
        >>> epoch_order(0, 0, 5) == epoch_order(0, 0, 5), sorted(epoch_order(0, 1, 5))
        (True, [0, 1, 2, 3, 4])
    """
    return permutation(seed, epoch, n)

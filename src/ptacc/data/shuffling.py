"""The order in which a run shuffles its samples: a function of the seed and the epoch."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ptacc.rng import derive_seed

IntArray: TypeAlias = NDArray[np.integer[Any]]
MAX_IN_MEMORY = 1 << 20
"""Most samples whose order is held in memory. More of them take longer to permute than a first step may wait."""
BLOCK = 1 << 13
"""Positions that are computed together."""
ROUNDS = 8


def shuffle(seed: int, epoch: int, n: int) -> IntArray | ComputedPermutation:
    """Return the order of `n` samples in an epoch, counted from 0."""
    derived = derive_seed(seed, epoch)
    if n > MAX_IN_MEMORY:
        return ComputedPermutation(derived, n)
    generator = torch.Generator().manual_seed(derived)
    array: IntArray = torch.randperm(n, generator=generator, dtype=torch.int32, device="cpu").numpy()
    return array


def epoch_order(seed: int, epoch: int, n: int) -> list[int]:
    """Return the order in which a run shuffles `n` samples in an epoch. Epochs are counted from 0.

    Example:
        >>> epoch_order(0, 0, 5) == epoch_order(0, 0, 5), sorted(epoch_order(0, 1, 5))
        (True, [0, 1, 2, 3, 4])
    """
    order: list[int] = shuffle(seed, epoch, n)[:].tolist()
    return order


class ComputedPermutation:
    """A pseudo-random permutation of `range(n)`. Only the positions that are asked for are computed.

    A position is split into its upper and its lower bits. In each round of a Feistel network, a hash of one part is
    added to the other, which can be undone, so that no two positions give the same number. Few numbers are not below
    `n`: those are permuted again, until they are.

    Source: J. Black and P. Rogaway, Ciphers with Arbitrary Finite Domains, 2002.

    Args:
        seed: Determines the permutation.
        n: Its length.

    Example:
        >>> permutation = ComputedPermutation(seed=3, n=10**12)
        >>> len(permutation), permutation[5:9].shape, sorted(ComputedPermutation(0, 4)[:].tolist())
        (1000000000000, (4,), [0, 1, 2, 3])
    """

    def __init__(self, seed: int, n: int) -> None:
        self._n = n
        bits = (n - 1).bit_length() // 2
        self._bits, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        self._high = np.uint64(((n - 1) >> bits) + 1)  # values of the upper part
        self._keys = np.array([derive_seed(seed, number) for number in range(ROUNDS)], dtype=np.uint64)
        self._start, self._block = 0, np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, positions: slice) -> IntArray:
        """Return the numbers at consecutive positions."""
        start, stop, _ = positions.indices(self._n)
        if not self._start <= start <= stop <= self._start + len(self._block):
            self._start, self._block = start, self._compute(start, min(max(stop, start + BLOCK), self._n))
        return self._block[start - self._start : max(stop - self._start, 0)]

    def _compute(self, start: int, stop: int) -> NDArray[np.int64]:
        numbers = self._permute(np.arange(start, stop, dtype=np.uint64))
        while (is_above := numbers >= self._n).any():
            numbers[is_above] = self._permute(numbers[is_above])
        return numbers.astype(np.int64)

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = numbers >> self._bits, numbers & self._mask
        for key in self._keys.reshape(-1, 2):
            high = (high + (mix(low + key[0]) >> np.uint64(1))) % self._high
            low = (low + mix(high + key[1])) & self._mask
        return high << self._bits | low


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash each value.

    Source: the finalizer of SplitMix64, G. Steele, D. Lea and C. Flood, Fast Splittable Pseudorandom Number
    Generators, 2014.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

"""Which samples are in which batch of which rank: pure functions of an epoch's order.

A *global batch* consists of the batches that all ranks train on at the same time. The order of the samples does not
depend on the world size, which only determines how each global batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ptacc.rng import derive_seed
from ptacc.types.aliases import T


@dataclass(slots=True)
class BatchKey:
    """What a rank needs to load one of its batches.

    Args:
        indices: Indices of its samples in the dataset.
        total: Number of samples in the global batch.
        seed_path: Run seed, epoch, number of the global batch and replica, from which the batch's seed is derived.
        is_padding: Whether the batch only gives this rank as many batches as the others have.
    """

    indices: Sequence[int]
    total: int
    seed_path: tuple[int, ...]
    is_padding: bool = False

    @property
    def seed(self) -> int:
        """Seed of the random numbers drawn while the batch is loaded."""
        return derive_seed(*self.seed_path)

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0."""
        return self.seed_path[1]

    @property
    def number(self) -> int:
        """The number of the global batch in the epoch, counted from 0."""
        return self.seed_path[2]

    @property
    def samples(self) -> int:
        """Number of samples, 0 for a padding batch."""
        return 0 if self.is_padding else len(self.indices)


def local_range(samples: Sequence[T], rank: int, world_size: int) -> Sequence[T]:
    """Return a rank's part of a global batch. Parts are contiguous, and their sizes differ by at most 1.

    Example:
        >>> [list(local_range(range(7), rank, 3)) for rank in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
    """
    return samples[len(samples) * rank // world_size : len(samples) * (rank + 1) // world_size]


def count_global_batches(samples: int, size: int, *, drop_last: bool) -> int:
    """Return the number of global batches in an epoch."""
    return samples // size if drop_last else math.ceil(samples / size)


def assign_samples(batch: Sequence[int], rank: int, world_size: int, seed_path: tuple[int, ...]) -> BatchKey:
    """Assign a rank its part of a global batch. A rank without a part gets the whole batch as padding."""
    local = batch if world_size == 1 else local_range(batch, rank, world_size)
    return BatchKey(local or batch, len(batch), seed_path, is_padding=not local)


def assign_batches(group: Sequence[Sequence[int]], rank: int, seed_path: tuple[int, ...]) -> BatchKey:
    """Assign a rank its batch of a group of batches. A rank without a batch gets the first one as padding."""
    total = sum(map(len, group))
    if rank < len(group):
        return BatchKey(group[rank], total, seed_path)
    return BatchKey(group[0], total, seed_path, is_padding=True)

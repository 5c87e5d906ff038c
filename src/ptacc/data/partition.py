"""Which samples are in which batch of which process: pure functions from an epoch's order to each rank's plan.

A *global batch* is what all processes train on at the same time. The order of the samples knows nothing of the number
of processes; the world size only deals each global batch out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import TypeVar

from ptacc.rng import derive_seed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BatchKey:
    """One batch of one process.

    Args:
        indices: Indices of its samples in the dataset.
        total: Number of samples in the global batch, over all processes.
        origin: Run seed, epoch, number of the global batch and replica, of which the batch's own seed is derived.
        is_padding: Whether the samples only keep this process in step with the others, and count nowhere.
    """

    indices: Sequence[int]
    total: int
    origin: tuple[int, ...]
    is_padding: bool = False

    @property
    def seed(self) -> int:
        """Seed of whatever randomness is in loading this batch."""
        return derive_seed(*self.origin)

    @property
    def samples(self) -> int:
        """Number of samples that count."""
        return 0 if self.is_padding else len(self.indices)


def local_range(samples: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """Return the part of a global batch that a rank gets: contiguous, and as even as can be.

    Example:
        >>> [list(local_range(range(7), rank, 3)) for rank in range(3)]
        [[0, 1], [2, 3], [4, 5, 6]]
    """
    return samples[len(samples) * rank // world_size : len(samples) * (rank + 1) // world_size]


def global_batches(order: Sequence[T], size: int, *, drop_last: bool) -> list[Sequence[T]]:
    """Cut an epoch's order into global batches of `size` of its parts; the last may be shorter, or is dropped."""
    end = len(order) - len(order) % size if drop_last else len(order)
    return [order[start : start + size] for start in range(0, end, size)]


def count_global_batches(samples: int, size: int, *, drop_last: bool) -> int:
    """Return the number of global batches in an epoch."""
    return samples // size if drop_last else math.ceil(samples / size)


def assign_samples(batch: Sequence[int], rank: int, world_size: int, origin: tuple[int, ...]) -> BatchKey:
    """Deal one global batch to a rank; a rank that gets none repeats the batch as a phantom."""
    mine = local_range(batch, rank, world_size)
    return BatchKey(mine or batch, len(batch), origin, is_padding=not mine)


def assign_batches(group: Sequence[Sequence[int]], rank: int, origin: tuple[int, ...]) -> BatchKey:
    """Deal one ready batch of a group to a rank; a rank beyond the group's end repeats the first as a phantom."""
    total = sum(map(len, group))
    if rank < len(group):
        return BatchKey(group[rank], total, origin)
    return BatchKey(group[0], total, origin, is_padding=True)

"""The order of an epoch: a permutation of the samples, or what the user's own sampler gives."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ptacc.data.loading import set_epoch
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import derive_seed, streams_seeded
from ptacc.types.protocols import StateDict, Stateful


def epoch_order(seed: int, epoch: int, n: int) -> list[int]:
    """Return the order in which a run shuffles `n` samples in an epoch. Epochs are counted from 0.

    Example:
        >>> epoch_order(0, 0, 5) == epoch_order(0, 0, 5), sorted(epoch_order(0, 1, 5))
        (True, [0, 1, 2, 3, 4])
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    order: list[int] = torch.randperm(n, generator=generator).tolist()
    return order


class ListedSampler:
    """A user's sampler or batch sampler, whose order is listed on rank 0 when an epoch begins, and broadcast.

    Its random numbers are derived from the run's seed.

    A sampler's order may depend on the epochs before. A `Stateful` sampler resumes from its saved state; any other is
    iterated once for each earlier epoch.
    """

    def __init__(self, sampler: Any, distributed: DistributedRuntime, seed: int) -> None:
        self._sampler: Any = sampler
        self._stateful = sampler if isinstance(sampler, Stateful) else None
        self._distributed, self._seed = distributed, seed
        self._next_epoch = 0
        self._state_at_start: StateDict = {}
        self._saved: StateDict = {}

    def __len__(self) -> int:
        try:
            return len(self._sampler)
        except TypeError:
            raise DataError(
                f"{type(self._sampler).__name__} has no length: a run is planned by the batches of an epoch. "
                "Give the sampler a __len__, or yield the samples from an IterableDataset."
            ) from None

    def order(self, epoch: int) -> Any:
        """Return the order of an epoch. A collective."""
        return self._distributed.broadcast(self._list(epoch) if self._distributed.rank == 0 else None)

    def _list(self, epoch: int) -> list[Any]:
        saved, self._saved = self._saved, {}
        is_within_epoch = saved.get("epoch") == epoch
        if self._stateful is not None:
            self._next_epoch = epoch
            if saved:
                self._stateful.load_state_dict(saved["before" if is_within_epoch else "now"])
            self._state_at_start = copy.deepcopy(self._stateful.state_dict())
        order: list[Any] = []
        for number in range(min(self._next_epoch, epoch), epoch + 1):
            set_epoch(self._sampler, number)
            with streams_seeded(derive_seed(self._seed, number)):
                order = list(self._sampler)
        self._next_epoch = epoch + 1
        if self._stateful is not None and is_within_epoch:
            self._stateful.load_state_dict(saved["now"])
        return order

    def state_dict(self) -> StateDict:
        """Return the state of a `Stateful` sampler before and after the current epoch was listed."""
        if self._stateful is None:
            return {}
        now = copy.deepcopy(self._stateful.state_dict())
        return {"epoch": self._next_epoch - 1, "before": self._state_at_start, "now": now}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore a state, which takes effect when the next order is listed."""
        self._saved = state_dict

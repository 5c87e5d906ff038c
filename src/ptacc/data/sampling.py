"""A user's own sampler, or batch sampler: listed on rank 0 and told to the others, reproducibly."""

from __future__ import annotations

import copy
from typing import Any

from ptacc.data.loading import set_epoch
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import derive_seed, streams_seeded
from ptacc.types.protocols import StateDict, Stateful


class ListedSampler:
    """A sampler whose order of an epoch is listed at the epoch's beginning.

    Where a run goes on in a later epoch, a sampler may have come to draw from where earlier epochs left it. One that
    is `Stateful` says where it was; any other is listed once for each earlier epoch.
    """

    def __init__(self, sampler: Any, distributed: DistributedRuntime, seed: int) -> None:
        """List `sampler` for `_distributed`, with randomness derived from the run's seed."""
        self._sampler: Any = sampler
        self._stateful = sampler if isinstance(sampler, Stateful) else None
        self._peers, self._seed = distributed, seed
        self._listed = 0
        self._before: StateDict = {}
        self._saved: StateDict = {}

    def __len__(self) -> int:
        """Return the length of an epoch's order."""
        try:
            return len(self._sampler)
        except TypeError:
            raise DataError(
                f"{type(self._sampler).__name__} has no length: a run is planned by the batches of an epoch. "
                "Give the sampler a __len__, or yield the samples from an IterableDataset."
            ) from None

    def order(self, epoch: int) -> Any:
        """Return the order of an epoch. A collective: every process makes the same call."""
        return self._peers.broadcast(self._list(epoch) if self._peers.rank == 0 else None)

    def _list(self, epoch: int) -> list[Any]:
        saved, self._saved = self._saved, {}
        is_within_epoch = saved.get("epoch") == epoch
        if self._stateful is not None:
            self._listed = epoch
            if saved:
                self._stateful.load_state_dict(saved["before" if is_within_epoch else "now"])
            self._before = copy.deepcopy(self._stateful.state_dict())
        order: list[Any] = []
        for number in range(min(self._listed, epoch), epoch + 1):
            set_epoch(self._sampler, number)
            with streams_seeded(derive_seed(self._seed, number)):
                order = list(self._sampler)
        self._listed = epoch + 1
        if self._stateful is not None and is_within_epoch:
            self._stateful.load_state_dict(saved["now"])
        return order

    def state_dict(self) -> StateDict:
        """Return the state of a `Stateful` sampler as it was before the present epoch was listed, and as it is now."""
        if self._stateful is None:
            return {}
        return {"epoch": self._listed - 1, "before": self._before, "now": copy.deepcopy(self._stateful.state_dict())}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a state, when an order is asked for next."""
        self._saved = state_dict

"""Seeding of the global generators while a batch is loaded."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.data import get_worker_info

from ptacc.data.loading import seeded_loading
from ptacc.data.partition import BatchKey
from ptacc.rng import ALL_HOST_STREAMS, find_drawn_streams, streams_seeded
from ptacc.types.protocols import StateDict

CHECK_EVERY = 64
"""Batches between two that are checked for draws. The first one of an epoch is checked."""


class BatchSeeding:
    """Seeds the global generators of Python, NumPy and torch that loading a batch draws from, and restores them.

    Seeding and restoring all three takes longer than the rest of a small step, and most datasets draw from none. So a
    batch is loaded with those seeded that an earlier batch of the run has drawn from. Every `CHECK_EVERY`-th batch of
    an epoch is loaded with all of them seeded, to find out which. Workers seed all of them for each batch.

    Args:
        always: Whether to seed all of them for each batch in the main process, too.
    """

    def __init__(self, *, always: bool) -> None:
        self._always = always
        self.reset()

    def reset(self) -> None:
        """Forget what batches have drawn from."""
        self._drawn = ALL_HOST_STREAMS if self._always else None  # None before the first check

    def load(self, load: Callable[[BatchKey], object], key: BatchKey) -> object:
        """Return `load(key)`."""
        if get_worker_info() is not None:
            with seeded_loading(key.seed):
                return load(key)
        is_checked = key.number % CHECK_EVERY == 0
        if self._drawn is not None and not self._drawn and not is_checked:
            return load(key)
        with streams_seeded(key.seed, ALL_HOST_STREAMS if is_checked or self._drawn is None else self._drawn):
            batch = load(key)
            if is_checked:
                self._drawn = find_drawn_streams(key.seed).union(self._drawn or ())
        return batch

    def state_dict(self) -> StateDict:
        """Return the generators that batches have drawn from, on which the batches to come depend."""
        return {"drawn": None if self._drawn is None else sorted(self._drawn)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore a state."""
        if state_dict["drawn"] is not None:
            self._drawn = frozenset(state_dict["drawn"]).union(self._drawn or ())

"""Watching how the batches of a run are loaded: where a step waits for its data, no hook of the loop can look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from ptacc.core.data import BatchSource, Dealing, HostBatch
from ptacc.types.protocols import StateDict

Batches: TypeAlias = Iterator[HostBatch[Any]]


class WatchedSource:
    """A source of batches, and somebody who sees each come: `run.data = WatchedSource(run.data, watch)`."""

    def __init__(self, source: BatchSource, watch: Callable[[Batches], Batches]) -> None:
        """Watch a source.

        Args:
            source: What has the batches.
            watch: Given the batches of an epoch that are to come, yields the same.
        """
        self._source, self._watch = source, watch

    def epoch(self, epoch: int, start: int = 0) -> Batches:
        """Iterate over the batches of one epoch from `start` on, as they are watched."""
        return self._watch(self._source.epoch(epoch, start))

    @property
    def dealing(self) -> Dealing:
        """How the data is dealt."""
        return self._source.dealing

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches of an epoch from `start` on, None where the data has no length."""
        return self._source.num_batches(start)

    def place_after(self, batches: int) -> int:
        """Return the place in an epoch's data after so many batches of each process."""
        return self._source.place_after(batches)

    def told(self) -> str:
        """Tell of the data what has to be the same on all processes."""
        return self._source.told()

    def state_dict(self) -> StateDict:
        """Return the state of the source."""
        return self._source.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Let the source go on from a state."""
        self._source.load_state_dict(state_dict)

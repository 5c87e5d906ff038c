"""Watching how the batches of a run are loaded: where a step waits for its data, no hook of the loop can look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias

from ptacc.data.batch import BatchSource, HostBatch, PartitionScheme
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.types.protocols import StateDict

Batches: TypeAlias = Iterator[HostBatch[Any]]


class ObservedSource:
    """A source of batches, and somebody who sees each come: `run.data = ObservedSource(run.data, watch)`."""

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
    def partition_scheme(self) -> PartitionScheme:
        """How the data is dealt."""
        return self._source.partition_scheme

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches of an epoch from `start` on, None where the data has no length."""
        return self._source.num_batches(start)

    def place_after(self, batches: int) -> int:
        """Return the place in an epoch's data after so many batches of each process."""
        return self._source.place_after(batches)

    def fingerprint(self) -> str:
        """Tell of the data what has to be the same on all processes."""
        return self._source.fingerprint()

    def state_dict(self) -> StateDict:
        """Return the state of the source."""
        return self._source.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Let the source go on from a state."""
        self._source.load_state_dict(state_dict)


def level(sources: Iterable[BatchSource]) -> None:
    """Let processes with data of their own hear of each other's. A collective: every process makes the same call."""
    for source in sources:
        if isinstance(source, PaddedSource):
            source.level()


def counted_once(batches: Iterator[HostBatch[Any]], distributed: DistributedRuntime) -> Iterator[HostBatch[Any]]:
    """Have batches that several processes of a replica take count for the first of them; for the others, phantoms."""
    return batches if distributed.is_replica_leader else (replace(batch, is_padding=True) for batch in batches)


class PaddedSource:
    """Data that each process has for itself: a process that runs out early repeats its last batch as a phantom."""

    def __init__(self, source: BatchSource, distributed: DistributedRuntime) -> None:
        """Level `source` over the processes."""
        self._source, self._peers = source, distributed
        self._num_batches: int | None = None
        self._of = ""

    def level(self) -> None:
        """Learn what the others have, and how many batches the process with most of them has."""
        self._of = ", ".join(self._peers.gather(self._source.partition_scheme.of))
        lengths = self._peers.gather(self._source.num_batches())
        known = [length for length in lengths if length is not None]
        self._num_batches = max(known) if len(known) == len(lengths) else None

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches from `start` on of the process that has most, None where one of them does not know."""
        return None if self._num_batches is None else max(self._num_batches - start, 0)

    def place_after(self, batches: int) -> int:
        """Return the number of batches."""
        return batches

    @property
    def partition_scheme(self) -> PartitionScheme:
        """What each process has is its own."""
        return PartitionScheme(
            self._of, f"{self._source.partition_scheme.how} on each of {self._peers.world_size} processes", False
        )

    def fingerprint(self) -> str:
        """Tell nothing: each process has data of its own."""
        return ""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        known = self._source.num_batches()
        first = 0 if known is None else min(start, max(known - 1, 0))  # the last one may be needed as a phantom
        batches = self._source.epoch(epoch, self._source.place_after(first))
        last: HostBatch[Any] | None = None
        for _ in range(first, start):
            last = next(batches, last)
        for end in count(start + 1):
            mine = next(batches, None)
            holder = self._peers.maximum(self._peers.rank if mine is not None else -1)
            if holder < 0:
                return
            last = mine or last
            if self._peers.maximum(int(last is None)):
                spare = self._peers.broadcast(last, source=holder)
                last = last or spare
            assert last is not None
            yield HostBatch(last.data, None, None, None, is_padding=mine is None, end=end)

    def state_dict(self) -> StateDict:
        """Return the state of this process's data."""
        return self._source.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a state."""
        self._source.load_state_dict(state_dict)


class LimitedSource:
    """The first batches of each epoch, for a smoke run."""

    def __init__(self, source: BatchSource, limit: int) -> None:
        """Take `limit` batches of each epoch of `source`."""
        self._source, self._limit = source, limit

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches of an epoch from `start` on, None where the data has no length."""
        known = self._source.num_batches()
        return None if known is None else max(min(known, self._limit) - start, 0)

    def place_after(self, batches: int) -> int:
        """Return the number of batches."""
        return batches

    @property
    def partition_scheme(self) -> PartitionScheme:
        """The limit is in batches."""
        return replace(
            self._source.partition_scheme,
            how=f"{self._source.partition_scheme.how} up to {self._limit}",
            goes_on_anew=False,
        )

    def fingerprint(self) -> str:
        """Tell what the source does, and the limit."""
        return f"{self._source.fingerprint()} up to {self._limit}".strip()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        batches = self._source.epoch(epoch, self._source.place_after(start))
        for end, batch in zip(range(start + 1, self._limit + 1), batches, strict=False):
            yield replace(batch, end=end)

    def state_dict(self) -> StateDict:
        """Return the state of the data."""
        return self._source.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a state."""
        self._source.load_state_dict(state_dict)

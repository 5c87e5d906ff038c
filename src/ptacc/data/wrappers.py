"""Sources that wrap another source: observed, limited, or padded to an equal number of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias

from typing_extensions import override

from ptacc.data.batch import BatchSource, HostBatch, PartitionScheme
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.types.protocols import StateDict

Batches: TypeAlias = Iterator[HostBatch[Any]]


class SourceWrapper(BatchSource):
    """A source that behaves like the one it wraps, where subclasses do not override it."""

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    @override
    def num_batches(self, start: int = 0) -> int | None:
        return self._source.num_batches(start)

    @override
    def offset_after(self, batches: int) -> int:
        return self._source.offset_after(batches)

    @property
    @override
    def partition_scheme(self) -> PartitionScheme:
        return self._source.partition_scheme

    @override
    def fingerprint(self) -> str:
        return self._source.fingerprint()

    @override
    def sync(self) -> None:
        self._source.sync()

    @override
    def set_epoch(self, epoch: int) -> None:
        self._source.set_epoch(epoch)

    @override
    def epoch(self, epoch: int, start: int = 0) -> Batches:
        return self._source.epoch(epoch, start)

    @override
    def state_dict(self) -> StateDict:
        return self._source.state_dict()

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self._source.load_state_dict(state_dict)

    @override
    def close(self) -> None:
        self._source.close()


class ObservedSource(SourceWrapper):
    """A source whose batches pass through an observer: `run.data = ObservedSource(run.data, observe)`.

    Args:
        source: The source.
        observe: Takes the iterator over an epoch's batches, and yields the same batches.
    """

    def __init__(self, source: BatchSource, observe: Callable[[Batches], Batches]) -> None:
        super().__init__(source)
        self._observe = observe

    @override
    def epoch(self, epoch: int, start: int = 0) -> Batches:
        return self._observe(self._source.epoch(epoch, start))


class LimitedSource(SourceWrapper):
    """The first `limit` batches of each epoch, for a smoke run. Offsets are numbers of batches."""

    def __init__(self, source: BatchSource, limit: int) -> None:
        super().__init__(source)
        self._limit = limit

    @override
    def num_batches(self, start: int = 0) -> int | None:
        available = self._source.num_batches()
        return None if available is None else max(min(available, self._limit) - start, 0)

    @override
    def offset_after(self, batches: int) -> int:
        return batches

    @property
    @override
    def partition_scheme(self) -> PartitionScheme:
        scheme = self._source.partition_scheme
        return replace(scheme, batching=f"{scheme.batching} up to {self._limit}", allows_rebatching=False)

    @override
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint()} up to {self._limit}".strip()

    @override
    def epoch(self, epoch: int, start: int = 0) -> Batches:
        batches = self._source.epoch(epoch, self._source.offset_after(start))
        ends = range(start + 1, self._limit + 1)
        return (replace(batch, end=end) for end, batch in zip(ends, batches, strict=False))


class PaddedSource(SourceWrapper):
    """Data of which each rank has its own part. A rank that runs out early repeats its last batch as padding.

    Offsets are numbers of batches. `sync` must be called before the source is used.
    """

    def __init__(self, source: BatchSource, distributed: DistributedRuntime) -> None:
        super().__init__(source)
        self._distributed = distributed
        self._num_batches: int | None = None
        self._data = ""

    @override
    def sync(self) -> None:
        self._data = ", ".join(self._distributed.gather(self._source.partition_scheme.data))
        lengths = self._distributed.gather(self._source.num_batches())
        known = [length for length in lengths if length is not None]
        self._num_batches = max(known) if len(known) == len(lengths) else None

    @override
    def num_batches(self, start: int = 0) -> int | None:
        """Return the number of batches left on the rank that has most, None if one of the ranks has no length."""
        return None if self._num_batches is None else max(self._num_batches - start, 0)

    @override
    def offset_after(self, batches: int) -> int:
        return batches

    @property
    @override
    def partition_scheme(self) -> PartitionScheme:
        batching = f"{self._source.partition_scheme.batching} on each of {self._distributed.world_size} processes"
        return PartitionScheme(self._data, batching, allows_rebatching=False, order=self._source.partition_scheme.order)

    @override
    def fingerprint(self) -> str:
        return ""

    @override
    def epoch(self, epoch: int, start: int = 0) -> Batches:
        available = self._source.num_batches()
        first = 0 if available is None else min(start, max(available - 1, 0))  # the last one may be needed as padding
        batches = self._source.epoch(epoch, self._source.offset_after(first))
        self.sync()
        return self._pad(batches, first, start)

    def _pad(self, batches: Batches, first: int, start: int) -> Batches:
        last: HostBatch[Any] | None = None
        for _ in range(first, start):
            last = next(batches, last)
        for end in count(start + 1):
            batch = next(batches, None)
            source_rank = self._distributed.maximum(self._distributed.rank if batch is not None else -1)
            if source_rank < 0:
                return
            last = batch or last
            if self._distributed.maximum(int(last is None)):
                received = self._distributed.broadcast(last, source=source_rank)
                last = last or received
            assert last is not None
            yield HostBatch(last.data, None, None, None, is_padding=batch is None, end=end)


def sync_sources(sources: Iterable[BatchSource]) -> None:
    """Exchange what the ranks must know of each other's data. A collective."""
    for source in sources:
        source.sync()


def count_once_per_replica(batches: Batches, distributed: DistributedRuntime) -> Batches:
    """Mark the batches as padding on all ranks of a model replica but the first, which have the same batches."""
    return batches if distributed.is_replica_leader else (replace(batch, is_padding=True) for batch in batches)


def fill_skipped(batches: Sequence[HostBatch[Any]], distributed: DistributedRuntime) -> list[HostBatch[Any]]:
    """Replace batches that a collate function left out by one of `batches`, of any rank, as padding. A collective.

    All ranks then run the same number of batches. Return none if all batches of all ranks were left out.
    """
    given = next((batch.data for batch in batches if batch.data is not None), None)
    found = next((data for data in distributed.gather(given) if data is not None), None)
    if found is None:
        return []
    filling = {"data": found, "samples": 0, "is_padding": True}
    return [replace(batch, **filling) if batch.data is None else batch for batch in batches]


def fill_each(batches: Batches, distributed: DistributedRuntime) -> Batches:
    """Apply `fill_skipped` to each batch. A collective for each batch that another rank may have left out."""
    for batch in batches:
        if batch.total is None and distributed.maximum(int(batch.data is None)):
            yield from fill_skipped([batch], distributed)
        else:
            yield batch

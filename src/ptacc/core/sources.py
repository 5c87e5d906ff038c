"""Sources: a loader is taken apart, and its batches are dealt to the processes.

Its dataset, order and collate function are kept. Loading a batch draws from generators seeded for that batch alone,
wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ptacc.core.data import BatchSource, HostBatch
from ptacc.core.dealt import DealtBatches
from ptacc.core.fetch import SharedStream
from ptacc.core.loaders import collate_of, given, is_torchs_collate, loader_settings, set_epoch
from ptacc.core.order import count_global_batches
from ptacc.core.peers import Peers
from ptacc.core.randomness import derive_seed, streams_seeded
from ptacc.types import Sharding


def source_of(
    loader: DataLoader[Any], peers: Peers, seed: int, *, sharding: Sharding = "auto", limit: int | None = None
) -> BatchSource:
    """Take a loader apart into the batches of this process, which hears nothing of the others yet: see `level`.

    Args:
        loader: The loader, made by a trainer or by the user.
        peers: The processes to deal to.
        seed: The run's seed, from which orders and loading draw.
        sharding: `"already"` where the loader of each process has its own data already.
        limit: Batches to take of each epoch, all if None.
    """
    dealt_to = Peers() if sharding == "already" else peers
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not peers.is_alone and sharding == "auto":
        dealt_to = Peers()
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        source: BatchSource = ReadyBatches(loader, dealt_to, seed)
    elif isinstance(loader.dataset, IterableDataset):
        source = StreamBatches(loader, dealt_to, seed)
    else:
        source = DealtBatches(loader, dealt_to, seed)
    if limit is not None:
        source = LimitedBatches(source, limit)
    return LevelledBatches(source, peers) if dealt_to is not peers and not peers.is_alone else source


def tell(sources: Mapping[str, BatchSource]) -> list[str]:
    """Tell of several sets of data what has to be the same on all processes."""
    return [f"{name} {told}".strip() for name, source in sources.items() if (told := source.told())]


def level(sources: Iterable[BatchSource]) -> None:
    """Let processes with data of their own hear of each other's. A collective: every process makes the same call."""
    for source in sources:
        if isinstance(source, LevelledBatches):
            source.level()


class StreamBatches:
    """An `IterableDataset`: every process reads the same stream and takes its share of each global batch."""

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        """Take over the loader's dataset, batch size and settings."""
        size = (loader.batch_size or 1) * peers.world_size
        self._stream = SharedStream(loader.dataset, collate_of(loader), size, loader.drop_last, peers, seed)
        self._loader = DataLoader(self._stream, batch_size=None, **loader_settings(loader))
        self._workers = max(loader.num_workers, 1)
        self._keeps_samples = is_torchs_collate(loader)

    @property
    def num_batches(self) -> int | None:
        """Batches of an epoch, None where the stream has no length; with several workers, as many as there can be."""
        return self._stream.num_batches(self._workers)

    def told(self) -> str:
        """Tell how samples are dealt."""
        return f"a stream in global batches of {self._stream.size}"

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        self._stream.begin(epoch)
        promised = self.num_batches if self._workers == 1 else None  # several may each end in a short batch
        batches = 0
        loaded = iter(self._loader)
        for data, samples, total in loaded:
            batches += 1
            if promised is not None and batches == promised and next(loaded, None) is not None:
                self._stream.check_length(batches + 1, promised, "more")
            if batches > start:
                yield HostBatch(
                    given(data), None, samples, total if self._keeps_samples else None, is_phantom=not samples
                )
        if promised is not None:
            self._stream.check_length(batches, promised, str(batches))


class ReadyBatches:
    """A loader that cannot be taken apart: its batches are dealt whole, one to each process in turn."""

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        """Keep the loader."""
        self._loader, self._peers, self._seed = loader, peers, seed

    @property
    def num_batches(self) -> int | None:
        """Batches of an epoch, None where the loader has no length."""
        try:
            return count_global_batches(len(self._loader), self._peers.world_size, drop_last=False)
        except TypeError:
            return None

    def told(self) -> str:
        """Tell nothing: loaders of one's own may have any form."""
        return ""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        set_epoch(self._loader, epoch)
        batches: Iterator[Any] | None = None
        index = 0
        while True:
            with streams_seeded(derive_seed(self._seed, epoch, index)):
                batches = iter(self._loader) if batches is None else batches
                group = [batch for _, batch in zip(range(self._peers.world_size), batches, strict=False)]
            if not group:
                return
            is_phantom = self._peers.rank >= len(group)
            if index >= start:
                yield HostBatch(given(group[0 if is_phantom else self._peers.rank]), None, None, None, is_phantom)
            index += 1


class LevelledBatches:
    """Data that each process has for itself: a process that runs out early repeats its last batch as a phantom."""

    def __init__(self, source: BatchSource, peers: Peers) -> None:
        """Level `source` over the processes."""
        self._source, self._peers = source, peers
        self._num_batches: int | None = None

    def level(self) -> None:
        """Learn how many batches the process with most of them has."""
        lengths = self._peers.gather(self._source.num_batches)
        known = [length for length in lengths if length is not None]
        self._num_batches = max(known) if len(known) == len(lengths) else None

    @property
    def num_batches(self) -> int | None:
        """Batches of an epoch on the process that has most, None where one of them does not know."""
        return self._num_batches

    def told(self) -> str:
        """Tell nothing: each process has data of its own."""
        return ""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        batches = self._source.epoch(epoch, start)
        last: HostBatch[Any] | None = None
        while True:
            mine = next(batches, None)
            holder = self._peers.maximum(self._peers.rank if mine is not None else -1)
            if holder < 0:
                return
            last = mine or last
            if self._peers.maximum(int(last is None)):
                spare = self._peers.broadcast(last, source=holder)
                last = last or spare
            assert last is not None
            yield HostBatch(last.data, None, None, None, is_phantom=mine is None)


class LimitedBatches:
    """The first batches of each epoch, for a smoke run."""

    def __init__(self, source: BatchSource, limit: int) -> None:
        """Take `limit` batches of each epoch of `source`."""
        self._source, self._limit = source, limit

    @property
    def num_batches(self) -> int | None:
        """Batches of an epoch, None where the data has no length."""
        known = self._source.num_batches
        return None if known is None else min(known, self._limit)

    def told(self) -> str:
        """Tell what the source does, and the limit."""
        return f"{self._source.told()} up to {self._limit}".strip()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        for _, batch in zip(range(start, self._limit), self._source.epoch(epoch, start), strict=False):
            yield batch

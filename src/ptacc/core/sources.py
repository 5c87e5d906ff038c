"""Sources: a loader is taken apart, and its batches are dealt to the processes.

Its dataset, order and collate function are kept. Loading a batch draws from generators seeded for that batch alone,
wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from typing_extensions import override

from ptacc.core.data import BatchSource, Dealing, HostBatch
from ptacc.core.dealt import DealtBatches
from ptacc.core.fetch import SharedStream
from ptacc.core.loaders import collate_of, given, is_torchs_collate, loader_settings, set_epoch
from ptacc.core.order import count_global_batches
from ptacc.core.replay import Replayed
from ptacc.distributed.process_group import Peers
from ptacc.errors import DataError
from ptacc.rng import derive_seed, streams_seeded
from ptacc.types.aliases import Sharding
from ptacc.types.protocols import StateDict, Stateful


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

    Raises:
        DataError: Processes that share a replica of the model have data of their own.
    """
    dealt_to = Peers() if sharding == "already" else peers
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not peers.is_alone and sharding == "auto":
        dealt_to = Peers()
    if dealt_to is not peers and peers.replica_size > 1:
        raise DataError(
            f"Each process has data of its own, and {peers.replica_size} share a replica of the model, which takes the "
            "same batches on all of them. Give every process the whole data, and leave sharding and samplers out."
        )
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


def counted_once(batches: Iterator[HostBatch[Any]], peers: Peers) -> Iterator[HostBatch[Any]]:
    """Have batches that several processes of a replica take count for the first of them; for the others, phantoms."""
    return batches if peers.leads_replica else (replace(batch, is_phantom=True) for batch in batches)


class StreamBatches(Replayed):
    """An `IterableDataset`: every process reads the same stream and takes its share of each global batch.

    One that is `Stateful`, and read without workers, says where it is, and is not read anew where a run goes on.
    """

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        """Take over the loader's dataset, batch size and settings."""
        super().__init__(loader.dataset)
        size = (loader.batch_size or 1) * peers.replicas
        self._stream = SharedStream(loader.dataset, collate_of(loader), size, loader.drop_last, peers, seed)
        self._loader = DataLoader(self._stream, batch_size=None, **loader_settings(loader))
        self._workers = max(loader.num_workers, 1)
        self._stateful = loader.dataset if isinstance(loader.dataset, Stateful) and not loader.num_workers else None
        self._place: StateDict | None = None
        self._is_at_end = False  # where a stream may be at its beginning again
        self._keeps_samples = is_torchs_collate(loader)

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches of an epoch from `start` on; with several workers, as many as there can be."""
        known = self._stream.num_batches(self._workers)
        return None if known is None else max(known - start, 0)

    def place_after(self, batches: int) -> int:
        """Return the number of batches: that is how places in a stream are told."""
        return batches

    @property
    def dealing(self) -> Dealing:
        """Whatever a stream draws from while it is read depends on where its batches end."""
        return Dealing("a stream", f"global batches of {self._stream.size}, {self._workers} at a time", False)

    def told(self) -> str:
        """Tell how samples are dealt."""
        return f"a stream in global batches of {self._stream.size}"

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        self._stream.begin(epoch)
        expected = self._begin(start)
        promised = self.num_batches() if self._workers == 1 else None  # several may each end in a short batch
        batches = 0
        place, self._place = self._place, None
        if start and place is not None:
            if self._is_at_end:
                return
            self._stream.begin_from(start, place)
            batches = start
        loaded = iter(self._loader)
        for data, samples, total in loaded:
            batches += 1
            if promised is not None and batches == promised and next(loaded, None) is not None:
                self._stream.check_length(batches + 1, promised, "more")
            if batches > start:
                self._is_at_end = total < self._stream.size
                total = total if self._keeps_samples else None
                mine = self._give(given(data))
                yield HostBatch(mine, None, samples, total, is_phantom=not samples, end=batches)
            elif batches == start:
                self._check(data, expected)
        if promised is not None:
            self._stream.check_length(batches, promised, str(batches))

    @override
    def state_dict(self) -> StateDict:
        """Return where a stream is that can say it, beside what a replay needs."""
        if self._stateful is None:
            return super().state_dict()
        return super().state_dict() | {"place": self._stateful.state_dict(), "is_at_end": self._is_at_end}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a state."""
        super().load_state_dict(state_dict)
        if self._stateful is not None and "place" in state_dict:
            self._place, self._is_at_end = state_dict["place"], state_dict["is_at_end"]


class ReadyBatches(Replayed):
    """A loader that cannot be taken apart: its batches are dealt whole, one to each process in turn."""

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        """Keep the loader."""
        super().__init__(loader)
        self._loader, self._peers, self._seed = loader, peers, seed

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches of an epoch from `start` on, None where the loader has no length."""
        try:
            return count_global_batches(max(len(self._loader) - start, 0), self._peers.replicas, drop_last=False)
        except TypeError:
            return None

    def place_after(self, batches: int) -> int:
        """Return the number of the loader's batches."""
        return batches * self._peers.replicas

    @property
    def dealing(self) -> Dealing:
        """Batches are whole, and can be dealt to any number of processes."""
        return Dealing(f"batches of {type(self._loader).__name__}", f"{self._peers.replicas} at a time", True)

    def told(self) -> str:
        """Tell nothing: loaders of one's own may have any form."""
        return ""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        set_epoch(self._loader, epoch)
        expected = self._begin(start)
        batches: Iterator[Any] | None = None
        end = 0
        while True:
            size = min(self._peers.replicas, start - end) if end < start else self._peers.replicas
            with streams_seeded(derive_seed(self._seed, epoch, end // self._peers.replicas)):
                batches = iter(self._loader) if batches is None else batches
                group = [batch for _, batch in zip(range(size), batches, strict=False)]
            if not group:
                return
            end += len(group)
            is_phantom = self._peers.replica >= len(group)
            mine = given(group[0 if is_phantom else self._peers.replica])
            if end > start:
                yield HostBatch(self._give(mine), None, None, None, is_phantom, end)
            elif end == start:
                self._check(mine, expected)


class LevelledBatches:
    """Data that each process has for itself: a process that runs out early repeats its last batch as a phantom."""

    def __init__(self, source: BatchSource, peers: Peers) -> None:
        """Level `source` over the processes."""
        self._source, self._peers = source, peers
        self._num_batches: int | None = None
        self._of = ""

    def level(self) -> None:
        """Learn what the others have, and how many batches the process with most of them has."""
        self._of = ", ".join(self._peers.gather(self._source.dealing.of))
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
    def dealing(self) -> Dealing:
        """What each process has is its own."""
        return Dealing(self._of, f"{self._source.dealing.how} on each of {self._peers.world_size} processes", False)

    def told(self) -> str:
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
            yield HostBatch(last.data, None, None, None, is_phantom=mine is None, end=end)

    def state_dict(self) -> StateDict:
        """Return the state of this process's data."""
        return self._source.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a state."""
        self._source.load_state_dict(state_dict)


class LimitedBatches:
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
    def dealing(self) -> Dealing:
        """The limit is in batches."""
        return replace(self._source.dealing, how=f"{self._source.dealing.how} up to {self._limit}", goes_on_anew=False)

    def told(self) -> str:
        """Tell what the source does, and the limit."""
        return f"{self._source.told()} up to {self._limit}".strip()

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

"""Sources: a loader is taken apart, and its batches are dealt to the processes.

Its dataset, order and collate function are kept. Loading a batch draws from generators seeded for that batch alone,
wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler, SequentialSampler
from typing_extensions import TypeVar

from ptacc.core.data import BatchSource, HostBatch, check_dataset
from ptacc.core.fetch import KeyedDataset, SharedStream, as_is, default_collate, probe
from ptacc.core.order import BatchKey, count_global_batches, deal_batches, deal_samples, global_batches
from ptacc.core.peers import Peers
from ptacc.core.randomness import derive_seed, permutation, streams_seeded
from ptacc.errors import DataError
from ptacc.types import Sharding

ResultT = TypeVar("ResultT")


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


class DealtBatches:
    """A map-style dataset, whose order is dealt to the processes batch by batch."""

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        """Take over the loader's dataset, order and settings."""
        assert loader.batch_sampler is not None
        check_dataset(loader.dataset)
        self._peers, self._seed = peers, seed
        self._order = _Order(loader, peers, seed)
        self._keys = _Keys()
        dataset = KeyedDataset(loader.dataset, collate_of(loader))
        self._keeps_samples = is_torchs_collate(loader)
        probe(loader.dataset)
        self._loader = DataLoader(
            dataset, batch_sampler=cast(Sampler[list[int]], self._keys), **loader_settings(loader)
        )

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return len(self._order)

    def told(self) -> str:
        """Tell the number of samples, and how they are dealt."""
        return self._order.told()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        keys = self._keys.keys = self._order.keys_of(epoch)[start:]
        for key, data in zip(keys, self._loader, strict=True):
            yield HostBatch(
                given(data), key.indices, key.samples, key.total if self._keeps_samples else None, key.is_phantom
            )


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


class _Keys:
    """The batch sampler of a dealt loader: it gives the keys that were laid in it."""

    def __init__(self) -> None:
        self.keys: list[BatchKey] = []

    def __iter__(self) -> Iterator[BatchKey]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Order:
    """The order of a loader's samples in each epoch, and this process's part of it."""

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        self._peers, self._seed = peers, seed
        self._batch_sampler = loader.batch_sampler
        # A loader that was given a batch sampler has no batch size.
        self._sampler = None if loader.batch_size is None else getattr(loader.batch_sampler, "sampler", None)
        self._samples = len(loader.dataset)  # type: ignore[arg-type]  # checked: it has a length
        self._size = (loader.batch_size or 1) * peers.world_size
        self._drop_last = loader.drop_last

    def __len__(self) -> int:
        if self._sampler is None:
            return count_global_batches(self._length_of(self._batch_sampler), self._peers.world_size, drop_last=False)
        samples = self._samples if self._is_torchs_own() else self._length_of(self._sampler)
        return count_global_batches(samples, self._size, drop_last=self._drop_last)

    def told(self) -> str:
        dealt = "batches of a batch sampler" if self._sampler is None else f"global batches of {self._size}"
        return f"{self._samples} samples in {dealt}"

    def keys_of(self, epoch: int) -> list[BatchKey]:
        rank, world_size = self._peers.rank, self._peers.world_size
        if self._sampler is None:
            batches = self._order_of_the_users(self._batch_sampler, epoch)
            groups = [batches[start : start + world_size] for start in range(0, len(batches), world_size)]
            return [deal_batches(group, rank, self._batch_seed(epoch, i)) for i, group in enumerate(groups)]
        order: Sequence[int] = range(self._samples)
        if isinstance(self._sampler, RandomSampler) and self._is_torchs_own():
            order = permutation(self._seed, epoch, self._samples)
        elif not self._is_torchs_own():
            order = self._order_of_the_users(self._sampler, epoch)
        batches = global_batches(order, self._size, drop_last=self._drop_last)
        return [deal_samples(batch, rank, world_size, self._batch_seed(epoch, i)) for i, batch in enumerate(batches)]

    def _batch_seed(self, epoch: int, index: int) -> int:
        return derive_seed(self._seed, epoch, index, self._peers.rank)

    def _is_torchs_own(self) -> bool:
        """Whether the order is `shuffle=True` or `shuffle=False`, and nothing else."""
        sampler = self._sampler
        plain_shuffle = (
            type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == self._samples
        )
        return type(sampler) is SequentialSampler or plain_shuffle

    def _order_of_the_users(self, sampler: Any, epoch: int) -> Any:
        """List a sampler of the user's own on rank 0, reproducibly, and tell the others."""
        order: Any = None
        if self._peers.rank == 0:
            set_epoch(sampler, epoch)
            with streams_seeded(derive_seed(self._seed, epoch)):
                order = list(sampler)
        return self._peers.broadcast(order)

    @staticmethod
    def _length_of(sampler: Any) -> int:
        try:
            return len(sampler)
        except TypeError:
            raise DataError(
                f"{type(sampler).__name__} has no length: a run is planned by the batches of an epoch. "
                "Give the sampler a __len__, or yield the samples from an IterableDataset."
            ) from None


def set_epoch(target: object, epoch: int) -> None:
    """Tell a sampler, dataset or loader that wants to know which epoch it is."""
    setter = getattr(target, "set_epoch", None)
    if callable(setter):
        setter(epoch)


def collate_of(loader: DataLoader[Any]) -> Callable[[list[Any]], object]:
    """Return the user's collate function, or torch's own with tuples left tuples."""
    return default_collate if is_torchs_collate(loader) else loader.collate_fn


def is_torchs_collate(loader: DataLoader[Any]) -> bool:
    """Say whether a batch has all samples that were loaded for it: a collate function of the user's may drop some."""
    return loader.collate_fn is torch.utils.data.default_collate


def loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the settings of a loader that have nothing to do with which samples are in which batch."""
    settings: dict[str, Any] = {
        "collate_fn": as_is,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "persistent_workers": loader.persistent_workers,
        "generator": torch.Generator(),
    }
    return settings | ({"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {})


def given(data: ResultT | None) -> ResultT:
    """Return a batch, unless the collate function forgot to."""
    if data is None:
        raise DataError("A batch is None: the collate function returned nothing. Check that it ends in `return batch`.")
    return data

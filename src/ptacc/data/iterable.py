"""Batches of an iterable dataset: a stream, shared by the ranks and their workers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    get_worker_info,
)
from typing_extensions import override

from ptacc.data.batch import HostBatch, PartitionScheme
from ptacc.data.loading import (
    Collate,
    get_collate_fn,
    is_torchs_collate,
    loader_settings,
    require_batch,
    seeded_loading,
)
from ptacc.data.partition import count_global_batches, local_range
from ptacc.data.replay import ReplaySource
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import derive_seed
from ptacc.types.protocols import StateDict, Stateful


class IterableSource(ReplaySource):
    """An `IterableDataset`: every process reads the same stream and takes its share of each global batch.

    One that is `Stateful`, and read without workers, says where it is, and is not read anew where a run goes on.
    """

    def __init__(self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int) -> None:
        """Take over the loader's dataset, batch size and settings."""
        super().__init__(loader.dataset)
        size = (loader.batch_size or 1) * distributed.replicas
        self._stream = SharedStream(loader.dataset, get_collate_fn(loader), size, loader.drop_last, distributed, seed)
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
    def partition_scheme(self) -> PartitionScheme:
        """Whatever a stream draws from while it is read depends on where its batches end."""
        return PartitionScheme("a stream", f"global batches of {self._stream.size}, {self._workers} at a time", False)

    def fingerprint(self) -> str:
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
                mine = self._give(require_batch(data))
                yield HostBatch(mine, None, samples, total, is_padding=not samples, end=batches)
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


class SharedStream(IterableDataset[Any]):
    """A stream that every process reads alike, giving each its share of every global batch."""

    def __init__(
        self, dataset: Any, collate: Collate, size: int, drop_last: bool, distributed: DistributedRuntime, seed: int
    ) -> None:
        """Cut `dataset` into global batches of `size` samples."""
        self.dataset = dataset
        self._collate, self.size, self._drop_last, self._seed = collate, size, drop_last, seed
        self._replica, self._replicas = distributed.replica, distributed.replicas
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # workers that persist must see it change
        self._from: tuple[int, StateDict] | None = None

    def begin(self, epoch: int) -> None:
        """Say which epoch is read next."""
        self._epoch.fill_(epoch)

    def begin_from(self, batch: int, state: StateDict) -> None:
        """Have the next reading, in this process, begin with a batch of the epoch, where the dataset was at `state`."""
        self._from = (batch, state)

    def num_batches(self, workers: int) -> int | None:
        """Return the batches of an epoch where the stream has a length; workers may each end in a short one."""
        try:
            samples = len(self.dataset)
        except TypeError:
            return None
        return workers * count_global_batches(-(-samples // workers), self.size, drop_last=self._drop_last)

    def check_length(self, batches: int, expected: int, gave: str) -> None:
        """Raise `DataError` if the stream gave another number of batches than its length promised."""
        if batches != expected:
            raise DataError(
                f"{type(self.dataset).__name__} said it has {len(self.dataset)} samples, which are {expected} batches, "
                f"and it gave {gave}. Correct its __len__, or leave it out and give max_steps."
            )

    @override
    def __iter__(self) -> Iterator[tuple[object, int, int]]:
        """Iterate over (batch, samples in it that count, samples of the global batch)."""
        epoch = int(self._epoch)
        setter = getattr(self.dataset, "set_epoch", None)
        if callable(setter):
            setter(epoch)
        worker = get_worker_info()
        first, self._from = self._from, None
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if first is not None:
            index = first[0]
            self.dataset.load_state_dict(first[1])
        samples: Iterator[Any] | None = None
        while True:
            with seeded_loading(derive_seed(self._seed, epoch, index)):
                samples = iter(self.dataset) if samples is None else samples
                chunk = list(islice(samples, self.size))
                if not chunk or (self._drop_last and len(chunk) < self.size):
                    return
                mine = list(local_range(range(len(chunk)), self._replica, self._replicas))
                batch = self._collate([chunk[i] for i in mine] or chunk)
            yield batch, len(mine), len(chunk)
            index += stride

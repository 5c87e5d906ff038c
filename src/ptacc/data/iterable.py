"""Batches of an iterable dataset: every rank and every worker reads the same stream, and keeps its part."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from ptacc.data.batch import HostBatch, PartitionScheme
from ptacc.data.loading import (
    get_collate_fn,
    get_loader_settings,
    has_default_collate,
    known_length,
    seeded_loading,
    set_epoch,
    stop_workers,
    unwrap_batch,
)
from ptacc.data.partition import count_global_batches, local_range
from ptacc.data.replay import ReplaySource
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import derive_seed
from ptacc.types.protocols import StateDict, Stateful


class IterableSource(ReplaySource):
    """An `IterableDataset`, of which each rank takes its part of every global batch. Offsets are numbers of batches.

    A dataset that is `Stateful` and read without workers resumes from its own state. Any other is replayed.
    """

    def __init__(self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int) -> None:
        super().__init__(loader.dataset)
        self._stream = SharedStream(loader, distributed, seed)
        self._loader = DataLoader(self._stream, batch_size=None, **get_loader_settings(loader))
        self._workers = max(loader.num_workers, 1)
        self._stateful = loader.dataset if isinstance(loader.dataset, Stateful) and not loader.num_workers else None
        self._dataset_state: StateDict | None = None
        self._is_at_end = False  # a stream at its end may have the state of its beginning
        self._keeps_samples = has_default_collate(loader)

    @override
    def num_batches(self, start: int = 0) -> int | None:
        """Return the number of batches left. With several workers it is an upper bound."""
        total = self._stream.num_batches(self._workers)
        return None if total is None else max(total - start, 0)

    @override
    def offset_after(self, batches: int) -> int:
        return batches

    @property
    @override
    def partition_scheme(self) -> PartitionScheme:
        # What a stream draws at random while it is read depends on where its batches end.
        batching = f"global batches of {self._stream.size}, {self._workers} at a time"
        return PartitionScheme("a stream", batching, allows_rebatching=False)

    @override
    def fingerprint(self) -> str:
        return f"a stream in global batches of {self._stream.size}"

    @override
    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        self._stream.set_epoch(epoch)
        digest = self._start_epoch(start)
        expected = self.num_batches() if self._workers == 1 else None  # several may each end in a short batch
        batches = 0
        dataset_state, self._dataset_state = self._dataset_state, None
        if start and dataset_state is not None:
            if self._is_at_end:
                return
            self._stream.resume_from(start, dataset_state)
            batches = start
        loaded = iter(self._loader)
        for data, samples, total in loaded:
            batches += 1
            if expected is not None and batches == expected and next(loaded, None) is not None:
                self._stream.check_length(batches + 1, expected, "more")
            if batches > start:
                self._is_at_end = total < self._stream.size
                total = total if self._keeps_samples else None
                self._last_batch = unwrap_batch(data)
                yield HostBatch(self._last_batch, None, samples, total, is_padding=not samples, end=batches)
            elif batches == start:
                self._check_replayed(data, digest)
        if expected is not None:
            self._stream.check_length(batches, expected, str(batches))

    @override
    def state_dict(self) -> StateDict:
        if self._stateful is None:
            return super().state_dict()
        return super().state_dict() | {"place": self._stateful.state_dict(), "is_at_end": self._is_at_end}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        super().load_state_dict(state_dict)
        if self._stateful is not None and "place" in state_dict:
            self._dataset_state, self._is_at_end = state_dict["place"], state_dict["is_at_end"]

    @override
    def close(self) -> None:
        stop_workers(self._loader)


class SharedStream(IterableDataset[Any]):
    """A stream that every rank reads in full, and that yields this rank's part of every global batch, collated."""

    def __init__(self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int) -> None:
        self.dataset: Any = loader.dataset
        self.size = (loader.batch_size or 1) * distributed.replicas
        self._collate, self._drop_last, self._seed = get_collate_fn(loader), loader.drop_last, seed
        self._replica, self._replicas = distributed.replica, distributed.replicas
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # persistent workers must see it change
        self._resume_state: tuple[int, StateDict] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read next."""
        self._epoch.fill_(epoch)

    def resume_from(self, batch: int, state: StateDict) -> None:
        """Start the next iteration, in this process, at a batch of the epoch and the dataset's state there."""
        self._resume_state = (batch, state)

    def num_batches(self, workers: int) -> int | None:
        """Return the largest number of batches of an epoch, None if the stream has no length."""
        samples = known_length(self.dataset)
        if samples is None:
            return None
        return workers * count_global_batches(-(-samples // workers), self.size, drop_last=self._drop_last)

    def check_length(self, batches: int, expected: int, given: str) -> None:
        """Raise `DataError` if the stream gave another number of batches than its length promised."""
        if batches != expected:
            raise DataError(
                f"{type(self.dataset).__name__} said it has {len(self.dataset)} samples, which are {expected} batches, "
                f"and it gave {given}. Correct its __len__, or leave it out and give max_steps."
            )

    @override
    def __iter__(self) -> Iterator[tuple[object, int, int]]:
        """Iterate over (batch, number of its samples or 0 for padding, number of samples in the global batch)."""
        epoch = int(self._epoch)
        set_epoch(self.dataset, epoch)
        worker = get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        if self._resume_state is not None:
            index, state = self._resume_state
            self._resume_state = None
            self.dataset.load_state_dict(state)
        samples: Iterator[Any] | None = None
        while True:
            with seeded_loading(derive_seed(self._seed, epoch, index)):
                samples = iter(self.dataset) if samples is None else samples
                chunk = list(islice(samples, self.size))
                if not chunk or (self._drop_last and len(chunk) < self.size):
                    return
                local = local_range(chunk, self._replica, self._replicas)
                batch = self._collate(list(local or chunk))
            yield batch, len(local), len(chunk)
            index += stride

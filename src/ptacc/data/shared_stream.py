"""The stream that every rank and every worker reads, of which each rank keeps its part, and its reader."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from typing_extensions import override

from ptacc.data.division import summarize
from ptacc.data.loading import get_collate_fn, known_length, seeded_loading, set_epoch
from ptacc.data.partition import count_global_batches, local_range
from ptacc.data.replay import compute_digest
from ptacc.data.workers import start_iteration
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import derive_seed
from ptacc.tensors.devices import HOST
from ptacc.types.protocols import StateDict, Stateful

LoadedItem: TypeAlias = tuple[Any, int, int, list[float] | None]
"""A batch, the number of its samples or 0 for padding, and the number of samples in the global batch.

The first one has a summary of the global batch, which must be the same on all ranks.
"""
DIGEST_SAMPLES = 8
"""Samples, at least, whose digest is saved with the state of a stream. One sample alone may be right by chance."""


class SharedStream(IterableDataset[Any]):
    """A stream that every rank reads in full, and that yields this rank's part of every global batch, collated."""

    def __init__(
        self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int, *, is_training: bool = True
    ) -> None:
        self.dataset: Any = loader.dataset
        self.size: int = (loader.batch_size or 1) * distributed.replicas
        self._collate, self._drop_last, self._seed = get_collate_fn(loader), loader.drop_last, seed
        self._is_training = is_training
        self._dataset_epoch = -1
        self._world_size = distributed.world_size
        self._replica, self._replicas = distributed.replica, distributed.replicas
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu")
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # persistent workers must see it change
        self._resume_state: tuple[int, StateDict | None] = (0, None)
        self.chunk: list[Any] = []  # samples of the last global batch that was read in this process

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read next, and that of the training data in this process."""
        self._epoch.fill_(epoch)
        self._set_dataset_epoch(epoch)

    def _set_dataset_epoch(self, epoch: int) -> None:
        self._dataset_epoch = epoch
        if self._is_training:
            set_epoch(self.dataset, epoch, self._seed)

    def resume_from(self, batch: int, state: StateDict | None) -> None:
        """Start the next iteration, in this process, at a batch of the epoch, with the dataset in a state."""
        self._resume_state = (batch, state)

    def num_batches(self, workers: int) -> int | None:
        """Return the number of batches of an epoch if the workers share it evenly, None if it has no length."""
        samples = known_length(self.dataset)
        if samples is None:
            return None
        shares = ((samples + worker) // workers for worker in range(workers))
        return sum(count_global_batches(share, self.size, drop_last=self._drop_last) for share in shares)

    def check_length(self, batches: int, expected: int, given: str) -> None:
        """Raise `DataError` if the stream gave another number of batches than its length promised."""
        if batches != expected:
            raise DataError(
                f"{type(self.dataset).__name__} said it has {len(self.dataset)} samples, which are {expected} batches, "
                f"and it gave {given}. Correct its __len__, or leave it out and give max_steps."
            )

    @override
    def __iter__(self) -> Iterator[LoadedItem]:
        epoch = int(self._epoch)
        if self._dataset_epoch != epoch:  # in a worker that persists
            self._set_dataset_epoch(epoch)
        worker = get_worker_info()
        index, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        resumed_at, state = self._resume_state
        self._resume_state = (0, None)
        if state is not None:
            self.dataset.load_state_dict(copy.deepcopy(state))
            index = resumed_at
        samples: Iterator[Any] | None = None
        is_compared = self._world_size > 1
        while True:
            with seeded_loading(derive_seed(self._seed, epoch, index)):
                samples = iter(self.dataset) if samples is None else samples
                chunk = list(islice(samples, self.size))
                if not chunk or (self._drop_last and len(chunk) < self.size):
                    return
                local = local_range(chunk, self._replica, self._replicas)
                batch = self._collate(list(local or chunk))
            self.chunk = chunk
            summary, is_compared = summarize(chunk) if is_compared else None, False
            yield batch, len(local), len(chunk), summary
            index += stride


@dataclass
class StreamItem:
    """What was read ahead of a stream: an item, None at the end, and the dataset's state before it."""

    state: StateDict | None
    item: LoadedItem | None
    chunk: list[Any]


class StreamReader:
    """Reads the batches of an epoch of a stream, and knows the dataset's state between two of them.

    To save a state, it reads the next batches ahead: their digest shows on resuming whether the state is complete.

    Args:
        loader: Loads the batches of `stream`.
        stream: The stream.
        batches: Number of batches read before.
        state: State of the dataset there, if it was loaded.
    """

    def __init__(
        self, loader: DataLoader[Any], stream: SharedStream, batches: int = 0, state: StateDict | None = None
    ) -> None:
        self.batches: int = batches
        with HOST:  # torch draws the seed of workers, with a generator of the host
            self._items, self._stream = start_iteration(loader), stream
        self._state, self._has_workers = state, loader.num_workers > 0
        self._ahead: deque[StreamItem] = deque()
        self._is_intact = True

    def __iter__(self) -> Iterator[LoadedItem]:
        while (item := self._ahead[0].item if self._ahead else self._read()) is not None:
            if self._ahead:
                self._ahead.popleft()
            self.batches, self._state = self.batches + 1, None
            yield item
        self._ahead.clear()
        self.peek()  # the end, and the state of the dataset there

    def first_summary(self) -> list[float] | None:
        """Return the summary of the first global batch, an empty one if the stream is empty."""
        self.peek()
        item = self._ahead[0].item
        return [] if item is None else item[-1]

    def peek(self, count: int = 1) -> bool:
        """Read up to `count` batches ahead. Return whether there is one."""
        while len(self._ahead) < count and (not self._ahead or self._ahead[-1].item is not None):
            state, self._state = self._state or self._dataset_state(), None
            item = self._read()
            # At the end of an epoch, a dataset may prepare its state for the next one.
            self._ahead.append(StreamItem(self._dataset_state() if item is None else state, item, self._stream.chunk))
        return self._ahead[0].item is not None

    def _read(self) -> LoadedItem | None:
        self._is_intact = False  # it stays so if the dataset raises an error
        item: LoadedItem | None = next(self._items, None)
        self._is_intact = True
        return item

    def state_dict(self) -> StateDict:
        """Return the dataset's state after the last batch, and the digest of those that follow, None at the end."""
        if not self._is_intact:
            return {"batches": self.batches}
        depth = -(-DIGEST_SAMPLES // self._stream.size)
        chunks = [ahead.chunk for ahead in self._ahead if ahead.item is not None] if self.peek(depth) else None
        digest = None if chunks is None else compute_digest(chunks[:depth])
        return {"batches": self.batches, "place": self._ahead[0].state, "next": digest}

    def _dataset_state(self) -> StateDict | None:
        dataset = self._stream.dataset
        if self._has_workers or not isinstance(dataset, Stateful):
            return None
        return copy.deepcopy(dataset.state_dict())

"""Loading one batch: the datasets that a dealt loader reads from, in this process or in a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, get_worker_info
from torch.utils.data import default_collate as torch_default_collate
from typing_extensions import override

from ptacc.core.order import BatchKey, count_global_batches, share_of
from ptacc.distributed.process_group import Peers
from ptacc.errors import DataError
from ptacc.rng import derive_seed, seed_everything, streams_seeded
from ptacc.types.protocols import StateDict

Collate = Callable[[list[Any]], object]
AT_ONCE = 1 << 18
"""Bytes of tensors in memory that are indexed at a time, at least a batch."""


def as_is(batch: object) -> object:
    """Return a batch that is collated already."""
    return batch


def default_collate(samples: list[Any]) -> object:
    """Collate as torch does, except that tuples give a tuple, not a list."""
    batch = torch_default_collate(samples)
    return tuple(batch) if isinstance(batch, list) and isinstance(samples[0], tuple) else batch


class KeyedDataset(Dataset[Any]):
    """A dataset asked for whole batches by their keys: loads and collates each with generators seeded for it."""

    def __init__(self, dataset: Any, collate: Collate) -> None:
        """Read from `dataset`."""
        self.dataset: Any = dataset
        self._collate = collate
        self._indexes_at_once = collate is default_collate and holds_plain_tensors(beneath_subsets(dataset, ())[0])

    def __getitems__(self, key: BatchKey) -> object:
        """Load and collate one batch. torch's loader calls this with whatever its batch sampler gives."""
        if self._indexes_at_once:
            return next(self._indexed([key]))
        with seeded_loading(key.seed):
            return self._collate(self._samples(key))

    def load_all(self, keys: Sequence[BatchKey]) -> Iterator[object]:
        """Load and collate one batch after the other; of tensors in memory, several at a time."""
        if not self._indexes_at_once or not keys:
            yield from map(self.__getitems__, keys)
            return
        tensors = beneath_subsets(self.dataset, ())[0].tensors
        row = sum(tensor[:1].nbytes for tensor in tensors)
        at_a_time = max(AT_ONCE // max(row * len(keys[0].indices), 1), 1)
        done = 0
        while done < len(keys):
            versions = versions_of(tensors)
            for batch in self._indexed(keys[done : done + at_a_time]):
                yield batch
                done += 1
                if versions_of(tensors) != versions:  # a step wrote to the data: what was read ahead is old
                    break

    def _indexed(self, keys: Sequence[BatchKey]) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over batches of tensors in memory, indexed together."""
        dataset, indices = beneath_subsets(self.dataset, [index for key in keys for index in key.indices])
        sizes = [len(key.indices) for key in keys]
        # Plain views would have a version in common, by which autograd sees changes in place.
        return zip(
            *(torch.unsafe_split_with_sizes(rows, sizes) for rows in rows_of(dataset.tensors, indices)), strict=True
        )

    @override
    def __getitem__(self, index: object) -> object:
        raise AssertionError("a keyed dataset is asked for batches, not for samples")

    def _samples(self, key: BatchKey) -> list[Any]:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return list(self.dataset.__getitems__(list(key.indices)))
            return [self.dataset[index] for index in key.indices]
        except LookupError as error:
            raise no_such_sample(self.dataset, f"an index up to {max(key.indices)}", error) from error


def holds_plain_tensors(dataset: object) -> bool:
    """Say whether a dataset is tensors in memory, and nothing else."""
    return type(dataset) is TensorDataset and all(tensor.layout is torch.strided for tensor in dataset.tensors)


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor was written to; of one made in inference mode nobody counts it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]  # noqa: SLF001  # see torch's notes


def rows_of(tensors: Sequence[Tensor], indices: Sequence[int]) -> tuple[Tensor, ...]:
    """Return rows of each tensor, which may be counted from the end by numbers below zero."""
    rows = torch.from_numpy(np.array(indices))  # a fifth of the time of `torch.tensor`
    try:
        return tuple([tensor.index_select(0, rows) for tensor in tensors])
    except (IndexError, RuntimeError):  # below zero, or the tensors lie on a device
        return tuple(tensor[rows] for tensor in tensors)


def beneath_subsets(dataset: Any, indices: Sequence[int]) -> tuple[Any, Sequence[int]]:
    """Return what a dataset is a part of, as `random_split` makes them, and the indices there."""
    while type(dataset) is Subset:
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    return dataset, indices


class SharedStream(IterableDataset[Any]):
    """A stream that every process reads alike, giving each its share of every global batch."""

    def __init__(self, dataset: Any, collate: Collate, size: int, drop_last: bool, peers: Peers, seed: int) -> None:
        """Cut `dataset` into global batches of `size` samples."""
        self.dataset = dataset
        self._collate, self.size, self._drop_last, self._seed = collate, size, drop_last, seed
        self._replica, self._replicas = peers.replica, peers.replicas
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
                mine = list(share_of(range(len(chunk)), self._replica, self._replicas))
                batch = self._collate([chunk[i] for i in mine] or chunk)
            yield batch, len(mine), len(chunk)
            index += stride


@contextlib.contextmanager
def seeded_loading(seed: int) -> Iterator[None]:
    """Seed the global generators for loading one batch: a worker's are its own, this process's are put back."""
    if get_worker_info() is not None:
        seed_everything(seed)
        yield
    else:
        with streams_seeded(seed):
            yield


def probe(dataset: Any) -> None:
    """Raise `DataError` where a dataset's `__len__` promises a last sample that is not there."""
    if isinstance(dataset, TensorDataset):
        return
    last = len(dataset) - 1
    try:
        with streams_seeded(0):
            dataset[last]
    except LookupError as error:
        raise no_such_sample(dataset, f"the index {last}", error) from error


def no_such_sample(dataset: Any, index: str, error: LookupError) -> DataError:
    """Make the error of a dataset that says it has a sample and has not."""
    return DataError(
        f"{type(dataset).__name__} says it has {len(dataset)} samples, and asked for {index} it raises "
        f"{type(error).__name__}({error}). Correct its __len__ or __getitem__."
    )

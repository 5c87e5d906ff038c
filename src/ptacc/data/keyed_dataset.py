"""A dataset whose items are collated batches, each with a seed of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from typing_extensions import override

from ptacc.data.loading import DATASETS, CollateFn, default_collate, set_epoch
from ptacc.data.partition import BatchKey
from ptacc.data.seeding import BatchSeeding
from ptacc.errors import DataError

INDEXED_BYTES = 1 << 18
"""Bytes of an in-memory dataset that are indexed together, at least one batch."""
ALIGNMENT = 64
"""Bytes to which torch aligns a tensor's memory on the CPU."""


class KeyedDataset(Dataset[Any]):
    """A dataset whose items are collated batches: each is loaded by its key, with generators seeded for it."""

    def __init__(self, dataset: Any, collate: CollateFn, seeding: BatchSeeding, seed: int) -> None:
        self.dataset: Any = dataset
        self._collate, self._seeding, self._seed = collate, seeding, seed
        self._loads_batches = hasattr(dataset, "__getitems__")
        self._is_in_memory = collate is default_collate and holds_plain_tensors(unwrap_subsets(dataset, ())[0])
        self._epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the dataset in this process. Workers that persist get it with the keys of their batches."""
        self._epoch = epoch
        set_epoch(self.dataset, epoch, self._seed, DATASETS)

    def __getitems__(self, key: BatchKey) -> object:
        """Load and collate one batch. Called by torch's loader with an item of its batch sampler."""
        if self._is_in_memory:
            return next(self._index_batches([key]))
        if self._epoch is not None and self._epoch != key.epoch:
            self.set_epoch(key.epoch)
        return self._seeding.load(self._load, key)

    def load_all(self, keys: Iterator[BatchKey]) -> Iterator[tuple[BatchKey, object]]:
        """Load and collate one batch after the other. Batches of tensors in memory are indexed several at a time."""
        if not self._is_in_memory:
            for key in keys:
                yield key, self.__getitems__(key)
            return
        tensors = unwrap_subsets(self.dataset, ())[0].tensors
        row_bytes = sum(tensor[:1].nbytes for tensor in tensors)
        for key in keys:
            ahead = max(INDEXED_BYTES // max(row_bytes * len(key.indices), 1), 1) - 1
            group, done = [key, *itertools.islice(keys, ahead)], 0
            while done < len(group):
                versions, rest = read_versions(tensors), group[done:]
                for pair in zip(rest, self._index_batches(rest), strict=True):
                    yield pair
                    done += 1
                    if read_versions(tensors) != versions:  # a step wrote to the data: batches read ahead are outdated
                        break

    def _index_batches(self, keys: Sequence[BatchKey]) -> Iterator[tuple[Tensor, ...]]:
        """Index several batches together, and iterate over them."""
        dataset, indices = unwrap_subsets(self.dataset, [index for key in keys for index in key.indices])
        sizes = [len(key.indices) for key in keys]
        # Plain views would share a version counter, by which autograd detects changes in place.
        columns = (torch.unsafe_split_with_sizes(rows, sizes) for rows in index_rows(dataset.tensors, indices))
        return zip(*(map(align, column) for column in columns), strict=True)

    @override
    def __getitem__(self, index: object) -> object:
        raise AssertionError("a keyed dataset loads batches, not samples")

    def _load(self, key: BatchKey) -> object:
        dataset = self.dataset
        try:
            if self._loads_batches:
                samples = list(dataset.__getitems__(list(key.indices)))
            else:
                samples = [dataset[index] for index in key.indices]
        except LookupError as error:
            if (missing := missing_sample_error(dataset, key.indices, error)) is None:
                raise
            raise missing from error
        return self._collate(samples)


def holds_plain_tensors(dataset: object) -> bool:
    """Return whether a dataset is a plain `TensorDataset` of strided tensors, without those that require a gradient.

    Batches of those have a graph. Batches that are indexed together would share it, and the first one would free it.
    """
    tensors = dataset.tensors if type(dataset) is TensorDataset else ()
    return bool(tensors) and all(tensor.layout is torch.strided and not tensor.requires_grad for tensor in tensors)


def read_versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor was written to, 0 for tensors made in inference mode, which do not count it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]  # noqa: SLF001  # see torch's notes


def index_rows(tensors: Sequence[Tensor], indices: Sequence[int]) -> tuple[Tensor, ...]:
    """Return rows of each tensor. Negative indices count from the end."""
    rows = torch.from_numpy(np.array(indices))  # a fifth of the time of `torch.tensor`
    try:
        return tuple([tensor.index_select(0, rows) for tensor in tensors])
    except (IndexError, RuntimeError):  # negative indices, or tensors on a device
        return tuple(tensor[rows] for tensor in tensors)


def align(rows: Tensor) -> Tensor:
    """Return rows in memory that begins as a tensor's own does: the last bit of a matrix product may depend on it.

    Otherwise it would depend on which batches are indexed together, and so on where an epoch is resumed.
    """
    return rows.clone() if rows.data_ptr() % ALIGNMENT else rows


def unwrap_subsets(dataset: Any, indices: Sequence[int]) -> tuple[Any, Sequence[int]]:
    """Return the dataset of which a `Subset` is a part, and the indices in it."""
    while type(dataset) is Subset:
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def missing_sample_error(dataset: Any, indices: Sequence[Any], error: LookupError) -> DataError | None:
    """Return the error for a dataset without a sample at one of `indices`, None if `error` is about something else."""
    if isinstance(error, KeyError):
        if not error.args or error.args[0] not in indices:
            return None  # a lookup within `__getitem__`
        indices = [error.args[0]]
    name, length, raised = type(dataset).__name__, len(dataset), f"{type(error).__name__}({error})"
    for index in indices:
        if not isinstance(index, int) or not -length <= index < length:
            return DataError(f"The sampler gives the index {index!r}, for which {name} of {length} samples has none.")
    return DataError(
        f"{name} says it has {length} samples, and asked for an index up to {max(indices)} it raises {raised}. "
        "Correct its __len__ or __getitem__."
    )

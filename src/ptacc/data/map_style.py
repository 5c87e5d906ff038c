"""Batches of a map-style dataset, assigned to the ranks from an order that each of them computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler, Subset, TensorDataset
from typing_extensions import override

from ptacc.data.batch import BatchSource, HostBatch, PartitionScheme
from ptacc.data.dataloader_config import check_dataset
from ptacc.data.loading import (
    CollateFn,
    default_collate,
    get_collate_fn,
    get_loader_settings,
    has_default_collate,
    require_batch,
    seeded_loading,
)
from ptacc.data.partition import BatchKey, assign_batches, assign_samples, count_global_batches, global_batches
from ptacc.data.sampling import ListedSampler, epoch_order
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import streams_seeded
from ptacc.types.protocols import StateDict

INDEXED_BYTES = 1 << 18
"""Bytes of an in-memory dataset that are indexed together, at least one batch."""


class MapStyleSource(BatchSource):
    """A map-style dataset with an order of its samples, or batches, that every rank knows. Offsets count these.

    The order does not depend on the number of ranks, so that a global batch may start anywhere in it.
    """

    def __init__(self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int) -> None:
        check_dataset(loader.dataset)
        check_last_sample(loader.dataset)
        self._distributed, self._seed = distributed, seed
        self._num_samples = len(loader.dataset)  # type: ignore[arg-type]  # checked: it has a length
        self._is_in_batches = loader.batch_size is None  # the loader was given a batch sampler
        sampler = loader.batch_sampler if self._is_in_batches else getattr(loader.batch_sampler, "sampler", None)
        self._sampler = describe_sampler(sampler)
        self._is_shuffled = is_plain_shuffle(sampler, self._num_samples)
        is_torchs_own = self._is_shuffled or type(sampler) is SequentialSampler
        self._listed = None if is_torchs_own else ListedSampler(sampler, distributed, seed)
        # Samples, or batches of a batch sampler, that all replicas take at a time.
        self._size = (1 if loader.batch_size is None else loader.batch_size) * distributed.replicas
        self._drop_last = loader.drop_last and not self._is_in_batches
        self._keeps_samples = has_default_collate(loader)
        self._dataset = KeyedDataset(loader.dataset, get_collate_fn(loader))
        self._key_sampler = _BatchKeySampler()
        batch_sampler = cast(Sampler[list[int]], self._key_sampler)
        self._loader = DataLoader(self._dataset, batch_sampler=batch_sampler, **get_loader_settings(loader))

    @property
    def _length(self) -> int:
        """The length of an epoch's order."""
        return self._num_samples if self._listed is None else len(self._listed)

    @override
    def num_batches(self, start: int = 0) -> int:
        return count_global_batches(max(self._length - start, 0), self._size, drop_last=self._drop_last)

    @override
    def offset_after(self, batches: int) -> int:
        return min(batches * self._size, self._length)

    @property
    @override
    def partition_scheme(self) -> PartitionScheme:
        data = f"{self._num_samples} samples"
        if self._listed is not None:
            data = f"{self._length} {'batches' if self._is_in_batches else 'draws'} of {data}"
        unit = "{} batches of a batch sampler" if self._is_in_batches else "global batches of {}"
        return PartitionScheme(data, unit.format(self._size), allows_rebatching=True, order=self._describe_order())

    def _describe_order(self) -> str:
        return f"{self._sampler}, drop_last" if self._drop_last else self._sampler

    @override
    def fingerprint(self) -> str:
        scheme = self.partition_scheme
        return f"{scheme.data} in {scheme.batching}"

    @override
    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        keys = self._key_sampler.keys = self._batch_keys(epoch, start)
        is_loaded_here = not (self._loader.num_workers or self._loader.pin_memory)
        loaded: Iterable[Any] = self._dataset.load_all(keys) if is_loaded_here else self._loader
        length = self._length
        for index, (key, data) in enumerate(zip(keys, loaded, strict=True), start=1):
            total = key.total if self._keeps_samples else None
            end = min(start + index * self._size, length)
            yield HostBatch(require_batch(data), key.indices, key.samples, total, key.is_padding, end)

    def _batch_keys(self, epoch: int, start: int) -> list[BatchKey]:
        """Return the keys of this rank's batches in an epoch from offset `start` on."""
        replica, replicas = self._distributed.replica, self._distributed.replicas
        groups = global_batches(self._order(epoch)[start:], self._size, drop_last=self._drop_last)
        keys = []
        for index, group in enumerate(groups, start // self._size):
            seed_path = (self._seed, epoch, index, replica)
            if self._is_in_batches:
                keys.append(assign_batches(group, replica, seed_path))
            else:
                keys.append(assign_samples(group, replica, replicas, seed_path))
        return keys

    def _order(self, epoch: int) -> Sequence[Any]:
        """Return the samples of an epoch, or its batches, in order."""
        if self._listed is not None:
            return cast(Sequence[Any], self._listed.order(epoch))
        return epoch_order(self._seed, epoch, self._num_samples) if self._is_shuffled else range(self._num_samples)

    @override
    def state_dict(self) -> StateDict:
        return {} if self._listed is None else self._listed.state_dict()

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        if self._listed is not None:
            self._listed.load_state_dict(state_dict)


class _BatchKeySampler:
    """The batch sampler of a loader that loads batches by their keys."""

    def __init__(self) -> None:
        self.keys: list[BatchKey] = []

    def __iter__(self) -> Iterator[BatchKey]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def is_plain_shuffle(sampler: object, samples: int) -> bool:
    """Return whether a sampler is what `shuffle=True` makes."""
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == samples


def describe_sampler(sampler: object) -> str:
    """Return the class of a sampler, and what one of torch's own was created with."""
    parts = {name: getattr(sampler, name, None) for name in ("replacement", "weights", "indices")}
    is_torchs_own = type(sampler).__module__.startswith("torch.")
    known = {name: value for name, value in parts.items() if is_torchs_own and value is not None}
    digests = {
        name: value if isinstance(value, bool) else f"{hash(tuple(getattr(value, 'tolist', value.__iter__)())):x}"
        for name, value in known.items()
    }
    return f"{type(sampler).__name__}({', '.join(f'{name}={value}' for name, value in digests.items())})"


class KeyedDataset(Dataset[Any]):
    """A dataset whose items are collated batches: each is loaded by its key, with generators seeded for it."""

    def __init__(self, dataset: Any, collate: CollateFn) -> None:
        self.dataset: Any = dataset
        self._collate = collate
        self._is_in_memory = collate is default_collate and holds_plain_tensors(unwrap_subsets(dataset, ())[0])

    def __getitems__(self, key: BatchKey) -> object:
        """Load and collate one batch. Called by torch's loader with an item of its batch sampler."""
        if self._is_in_memory:
            return next(self._index_batches([key]))
        with seeded_loading(key.seed):
            return self._collate(self._load_samples(key))

    def load_all(self, keys: Sequence[BatchKey]) -> Iterator[object]:
        """Load and collate one batch after the other. Batches of tensors in memory are indexed several at a time."""
        if not self._is_in_memory or not keys:
            yield from map(self.__getitems__, keys)
            return
        tensors = unwrap_subsets(self.dataset, ())[0].tensors
        row_bytes = sum(tensor[:1].nbytes for tensor in tensors)
        group_size = max(INDEXED_BYTES // max(row_bytes * len(keys[0].indices), 1), 1)
        done = 0
        while done < len(keys):
            versions = read_versions(tensors)
            for batch in self._index_batches(keys[done : done + group_size]):
                yield batch
                done += 1
                if read_versions(tensors) != versions:  # a step wrote to the data: batches read ahead are outdated
                    break

    def _index_batches(self, keys: Sequence[BatchKey]) -> Iterator[tuple[Tensor, ...]]:
        """Index several batches together, and iterate over them."""
        dataset, indices = unwrap_subsets(self.dataset, [index for key in keys for index in key.indices])
        sizes = [len(key.indices) for key in keys]
        # Plain views would share a version counter, by which autograd detects changes in place.
        columns = (torch.unsafe_split_with_sizes(rows, sizes) for rows in index_rows(dataset.tensors, indices))
        return zip(*columns, strict=True)

    @override
    def __getitem__(self, index: object) -> object:
        raise AssertionError("a keyed dataset loads batches, not samples")

    def _load_samples(self, key: BatchKey) -> list[Any]:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return list(self.dataset.__getitems__(list(key.indices)))
            return [self.dataset[index] for index in key.indices]
        except LookupError as error:
            raise missing_sample_error(self.dataset, f"an index up to {max(key.indices)}", error) from error


def holds_plain_tensors(dataset: object) -> bool:
    """Return whether a dataset is a plain `TensorDataset` of strided tensors."""
    return type(dataset) is TensorDataset and all(tensor.layout is torch.strided for tensor in dataset.tensors)


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


def unwrap_subsets(dataset: Any, indices: Sequence[int]) -> tuple[Any, Sequence[int]]:
    """Return the dataset of which a `Subset` is a part, and the indices in it."""
    while type(dataset) is Subset:
        indices = [dataset.indices[index] for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def check_last_sample(dataset: Any) -> None:
    """Raise `DataError` if a dataset has fewer samples than its `__len__` says."""
    if isinstance(dataset, TensorDataset):
        return
    last = len(dataset) - 1
    try:
        with streams_seeded(0):
            dataset[last]
    except LookupError as error:
        raise missing_sample_error(dataset, f"the index {last}", error) from error


def missing_sample_error(dataset: Any, index: str, error: LookupError) -> DataError:
    """Return the error for a dataset that raised `error` for an index below its length."""
    return DataError(
        f"{type(dataset).__name__} says it has {len(dataset)} samples, and asked for {index} it raises "
        f"{type(error).__name__}({error}). Correct its __len__ or __getitem__."
    )

"""Batches of a map-style dataset, dealt to the processes from an order that all of them know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)
from typing_extensions import override

from ptacc.data.batch import HostBatch, PartitionScheme
from ptacc.data.dataloader_config import check_dataset
from ptacc.data.loading import (
    Collate,
    default_collate,
    get_collate_fn,
    is_torchs_collate,
    loader_settings,
    require_batch,
    seeded_loading,
)
from ptacc.data.partition import BatchKey, assign_batches, assign_samples, count_global_batches, global_batches
from ptacc.data.sampling import ListedSampler
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import permutation, streams_seeded
from ptacc.types.protocols import StateDict


class MapStyleSource:
    """A map-style dataset, whose order is dealt to the processes batch by batch."""

    def __init__(self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int) -> None:
        """Take over the loader's dataset, order and settings."""
        assert loader.batch_sampler is not None
        check_dataset(loader.dataset)
        self._peers, self._seed = distributed, seed
        self._order = _Order(loader, distributed, seed)
        self._keys = _Keys()
        self._dataset = KeyedDataset(loader.dataset, get_collate_fn(loader))
        self._keeps_samples = is_torchs_collate(loader)
        probe(loader.dataset)
        self._loader = DataLoader(
            self._dataset, batch_sampler=cast(Sampler[list[int]], self._keys), **loader_settings(loader)
        )

    def num_batches(self, start: int = 0) -> int:
        """Return the batches of an epoch from `start` on."""
        return self._order.num_batches(start)

    def place_after(self, batches: int) -> int:
        """Return the place in the order."""
        return self._order.place_after(batches, 0)

    @property
    def partition_scheme(self) -> PartitionScheme:
        """From the order, which knows nothing of the number of processes, global batches can be cut anywhere."""
        return PartitionScheme(self._order.parts, self._order.groups, goes_on_anew=True)

    def fingerprint(self) -> str:
        """Tell the number of samples, and how they are dealt."""
        return f"{self._order.parts} in {self._order.groups}"

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        keys = self._keys.keys = self._order.keys_of(epoch, start)
        is_here = not (self._loader.num_workers or self._loader.pin_memory)
        loaded: Iterable[Any] = self._dataset.load_all(keys) if is_here else self._loader
        for index, (key, data) in enumerate(zip(keys, loaded, strict=True), start=1):
            total = key.total if self._keeps_samples else None
            end = self._order.place_after(index, start)
            yield HostBatch(require_batch(data), key.indices, key.samples, total, key.is_padding, end)

    def state_dict(self) -> StateDict:
        """Return the state of a sampler that has one."""
        return self._order.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a state."""
        self._order.load_state_dict(state_dict)


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

    def __init__(self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int) -> None:
        self._peers, self._seed = distributed, seed
        self.samples = len(loader.dataset)  # type: ignore[arg-type]  # checked: it has a length
        # A loader that was given a batch sampler has no batch size.
        self._is_in_batches = loader.batch_size is None
        sampler = loader.batch_sampler if self._is_in_batches else getattr(loader.batch_sampler, "sampler", None)
        self._is_shuffled = is_plain_shuffle(sampler, self.samples)
        is_torchs_own = self._is_shuffled or type(sampler) is SequentialSampler
        self._listed = None if is_torchs_own else ListedSampler(sampler, distributed, seed)
        # What all replicas take of the order at a time: samples, or batches of a batch sampler.
        self._size = (1 if loader.batch_size is None else loader.batch_size) * distributed.replicas
        self._drop_last = loader.drop_last and not self._is_in_batches

    def __len__(self) -> int:
        return self.samples if self._listed is None else len(self._listed)

    def num_batches(self, start: int) -> int:
        return count_global_batches(max(len(self) - start, 0), self._size, drop_last=self._drop_last)

    def place_after(self, batches: int, start: int) -> int:
        """Return the place in the order after so many global batches from `start` on."""
        return min(start + batches * self._size, len(self))

    @property
    def parts(self) -> str:
        """What the order is of, in words."""
        if self._listed is None:
            return f"{self.samples} samples"
        return f"{len(self)} {'batches' if self._is_in_batches else 'draws'} of {self.samples} samples"

    @property
    def groups(self) -> str:
        """What is taken at a time, in words."""
        return f"{self._size} batches of a batch sampler" if self._is_in_batches else f"global batches of {self._size}"

    def keys_of(self, epoch: int, start: int) -> list[BatchKey]:
        replica, replicas = self._peers.replica, self._peers.replicas
        groups = global_batches(self._order_of(epoch)[start:], self._size, drop_last=self._drop_last)
        origins = [(self._seed, epoch, start // self._size + i, replica) for i in range(len(groups))]
        if self._is_in_batches:
            return [assign_batches(group, replica, origin) for group, origin in zip(groups, origins, strict=True)]
        return [assign_samples(group, replica, replicas, origin) for group, origin in zip(groups, origins, strict=True)]

    def _order_of(self, epoch: int) -> Sequence[Any]:
        """Return an epoch's samples, or its batches, in their order."""
        if self._listed is not None:
            return cast(Sequence[Any], self._listed.order(epoch))
        return permutation(self._seed, epoch, self.samples) if self._is_shuffled else range(self.samples)

    def state_dict(self) -> StateDict:
        return {} if self._listed is None else self._listed.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        if self._listed is not None:
            self._listed.load_state_dict(state_dict)


def is_plain_shuffle(sampler: object, samples: int) -> bool:
    """Say whether a sampler is `shuffle=True`, and nothing else."""
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == samples


AT_ONCE = 1 << 18
"""Bytes of tensors in memory that are indexed at a time, at least a batch."""


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
            versions = read_versions(tensors)
            for batch in self._indexed(keys[done : done + at_a_time]):
                yield batch
                done += 1
                if read_versions(tensors) != versions:  # a step wrote to the data: what was read ahead is old
                    break

    def _indexed(self, keys: Sequence[BatchKey]) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over batches of tensors in memory, indexed together."""
        dataset, indices = beneath_subsets(self.dataset, [index for key in keys for index in key.indices])
        sizes = [len(key.indices) for key in keys]
        # Plain views would have a version in common, by which autograd sees changes in place.
        return zip(
            *(torch.unsafe_split_with_sizes(rows, sizes) for rows in index_rows(dataset.tensors, indices)), strict=True
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


def read_versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often each tensor was written to; of one made in inference mode nobody counts it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]  # noqa: SLF001  # see torch's notes


def index_rows(tensors: Sequence[Tensor], indices: Sequence[int]) -> tuple[Tensor, ...]:
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

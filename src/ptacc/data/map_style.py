"""Batches of a map-style dataset, assigned to the ranks from an order that each of them computes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler, Subset, TensorDataset
from typing_extensions import override

from ptacc.data.batch import BatchSource, HostBatch, PartitionScheme
from ptacc.data.dataloader_config import check_dataset
from ptacc.data.division import check_same_on_all_ranks, is_close, summarize
from ptacc.data.loading import (
    DATASETS,
    CollateFn,
    default_collate,
    get_collate_fn,
    get_loader_settings,
    has_default_collate,
    seeded_loading,
    set_epoch,
    stop_workers,
    unwrap_batch,
)
from ptacc.data.partition import BatchKey, assign_batches, assign_samples, count_global_batches
from ptacc.data.sampling import IntArray, ListedSampler, permutation
from ptacc.data.workers import start_iteration
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import streams_seeded
from ptacc.types.protocols import StateDict

INDEXED_BYTES = 1 << 18
"""Bytes of an in-memory dataset that are indexed together, at least one batch."""
ALIGNMENT = 64
"""Bytes to which torch aligns a tensor's memory on the CPU."""

Order: TypeAlias = Sequence[Any] | IntArray
"""The samples of an epoch, or its batches."""


class MapStyleSource(BatchSource):
    """A map-style dataset with an order of its samples, or batches, that every rank knows. Offsets count these.

    The order does not depend on the number of ranks, so that a global batch may start anywhere in it.
    """

    def __init__(
        self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int, *, sets_epoch: bool = True
    ) -> None:
        check_dataset(loader.dataset)
        self._distributed, self._seed, self._sets_epoch = distributed, seed, sets_epoch
        self._is_in_batches = loader.batch_size is None  # the loader was given a batch sampler
        sampler = loader.batch_sampler if self._is_in_batches else getattr(loader.batch_sampler, "sampler", None)
        self._sampler = describe_sampler(sampler)
        self._is_shuffled = is_plain_shuffle(sampler, len(loader.dataset))  # type: ignore[arg-type]  # checked
        is_torchs_own = self._is_shuffled or type(sampler) is SequentialSampler
        self._listed = None if is_torchs_own else ListedSampler(sampler, distributed, seed)
        # Samples, or batches of a batch sampler, that all replicas take at a time.
        self._size = (1 if loader.batch_size is None else loader.batch_size) * distributed.replicas
        self._drop_last = loader.drop_last and not self._is_in_batches
        self._keeps_samples = has_default_collate(loader)
        self._dataset = KeyedDataset(loader.dataset, get_collate_fn(loader))
        self._order: Order | None = None
        self._key_sampler = _BatchKeySampler()
        batch_sampler = cast(Sampler[list[int]], self._key_sampler)
        self._loader = DataLoader(self._dataset, batch_sampler=batch_sampler, **get_loader_settings(loader))

    @property
    def _num_samples(self) -> int:
        return len(self._dataset.dataset)

    @property
    def _length(self) -> int:
        """The length of the current epoch's order, or that of the first one as promised."""
        if self._order is not None:
            return len(self._order)
        return self._num_samples if self._listed is None else len(self._listed)

    @override
    def num_batches(self, start: int = 0) -> int:
        return count_global_batches(max(self._length - start, 0), self._size, drop_last=self._drop_last)

    @override
    def offset_after(self, batches: int) -> int:
        return batches * self._size

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
    def sync(self) -> None:
        if self._distributed.is_single_process:
            return
        dataset = self._dataset.dataset
        # With workers, this process loads no sample: a file that it opened would be shared with them.
        summary = None if self._loader.num_workers else summarize_last_sample(dataset)
        check_same_on_all_ranks(self._distributed, type(dataset).__name__, summary)

    @override
    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        if self._sets_epoch:
            self._dataset.set_epoch(epoch)
        self._order = self._make_order(epoch)
        make_keys = self._key_sampler.make_keys = partial(self._make_keys, self._order, epoch, start)
        if self._loader.num_workers or self._loader.pin_memory:
            loaded = map(unwrap_batch, start_iteration(self._loader))
            return self._host_batches(zip(make_keys(), loaded, strict=True), start)
        return self._host_batches(self._dataset.load_all(make_keys()), start)

    def _host_batches(self, loaded: Iterable[tuple[BatchKey, Any]], start: int) -> Iterator[HostBatch[Any]]:
        length, size, keeps_samples = self._length, self._size, self._keeps_samples
        for end, (key, data) in zip(itertools.count(start + size, size), loaded, strict=False):
            indices: Sequence[int] | None = key.indices
            if self._listed is not None and isinstance(next(iter(key.indices), 0), str | tuple):
                indices = None  # keys are no places
            total = key.total if keeps_samples else None
            yield HostBatch(data, indices, key.samples, total, key.is_padding, min(end, length))

    def _make_keys(self, order: Order, epoch: int, start: int) -> Iterator[BatchKey]:
        """Iterate over the keys of this rank's batches in an epoch from offset `start` on."""
        replica, replicas, size = self._distributed.replica, self._distributed.replicas, self._size
        for index in range(self.num_batches(start)):
            group = order[start + index * size : start + (index + 1) * size]
            seed_path = (self._seed, epoch, start // size + index, replica)
            if self._is_in_batches:
                yield assign_batches(cast(Sequence[Sequence[int]], group), replica, seed_path)
            else:
                samples = group.tolist() if isinstance(group, np.ndarray) else group
                yield assign_samples(samples, replica, replicas, seed_path)

    def _make_order(self, epoch: int) -> Order:
        """Return the samples of an epoch, or its batches, in order."""
        if self._listed is not None:
            return cast(Sequence[Any], self._listed.order(epoch))
        length = self._num_samples
        return permutation(self._seed, epoch, length) if self._is_shuffled else range(length)

    @override
    def state_dict(self) -> StateDict:
        return {} if self._listed is None else self._listed.state_dict()

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        if self._listed is not None:
            self._listed.load_state_dict(state_dict)

    @override
    def close(self) -> None:
        stop_workers(self._loader)


class _BatchKeySampler:
    """The batch sampler of a loader that loads batches by their keys."""

    make_keys: Callable[[], Iterator[BatchKey]]

    def __iter__(self) -> Iterator[BatchKey]:
        return self.make_keys()


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
        self._epoch: int | None = None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the dataset in this process. Workers that persist get it with the keys of their batches."""
        self._epoch = epoch
        set_epoch(self.dataset, epoch, DATASETS)

    def __getitems__(self, key: BatchKey) -> object:
        """Load and collate one batch. Called by torch's loader with an item of its batch sampler."""
        if self._is_in_memory:
            return next(self._index_batches([key]))
        if self._epoch is not None and self._epoch != key.epoch:
            self.set_epoch(key.epoch)
        with seeded_loading(key.seed):
            return self._collate(self._load_samples(key))

    def load_all(self, keys: Iterator[BatchKey]) -> Iterator[tuple[BatchKey, object]]:
        """Load and collate one batch after the other. Batches of tensors in memory are indexed several at a time."""
        if not self._is_in_memory:
            yield from ((key, self.__getitems__(key)) for key in keys)
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

    def _load_samples(self, key: BatchKey) -> list[Any]:
        try:
            if hasattr(self.dataset, "__getitems__"):
                return list(self.dataset.__getitems__(list(key.indices)))
            return [self.dataset[index] for index in key.indices]
        except LookupError as error:
            if (missing := missing_sample_error(self.dataset, key.indices, error)) is None:
                raise
            raise missing from error


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


def summarize_last_sample(dataset: Any) -> list[float] | None:
    """Return a summary of the last sample, None if it differs each time it is loaded, or has no number as its index."""
    summaries = []
    for _ in range(2):
        with contextlib.suppress(LookupError, TypeError), streams_seeded(0):
            summaries.append(summarize(dataset[len(dataset) - 1]))
    return summaries[0] if len(summaries) == 2 and is_close(*summaries) else None


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

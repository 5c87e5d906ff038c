"""Batches of a map-style dataset, assigned to the ranks from an order that each of them computes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from typing_extensions import override

from ptacc.data.batch import BatchSource, HostBatch, PartitionScheme
from ptacc.data.dataloader_config import check_dataset
from ptacc.data.division import check_same_on_all_ranks, is_close, summarize
from ptacc.data.keyed_dataset import KeyedDataset
from ptacc.data.loading import (
    get_collate_fn,
    get_loader_settings,
    has_default_collate,
    stop_workers,
    unwrap_batch,
)
from ptacc.data.partition import BatchKey, assign_batches, assign_samples, count_global_batches
from ptacc.data.sampling import ListedSampler, describe_sampler, is_plain_shuffle
from ptacc.data.seeding import BatchSeeding
from ptacc.data.shuffling import ComputedPermutation, IntArray, shuffle
from ptacc.data.workers import start_iteration
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.rng import streams_seeded
from ptacc.tensors.devices import HOST
from ptacc.types.protocols import StateDict

Order: TypeAlias = Sequence[Any] | IntArray | ComputedPermutation
"""The samples of an epoch, or its batches."""


class MapStyleSource(BatchSource):
    """A map-style dataset with an order of its samples, or batches, that every rank knows. Offsets count these.

    The order does not depend on the number of ranks, so that a global batch may start anywhere in it.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        distributed: DistributedRuntime,
        seed: int,
        *,
        is_training: bool = True,
        seed_every_batch: bool = False,
    ) -> None:
        check_dataset(loader.dataset)
        self._distributed, self._seed, self._is_training = distributed, seed, is_training
        self._is_in_batches = loader.batch_size is None  # the loader was given a batch sampler
        sampler = loader.batch_sampler if self._is_in_batches else getattr(loader.batch_sampler, "sampler", None)
        self._sampler = describe_sampler(sampler)
        self._is_shuffled = is_plain_shuffle(sampler, len(loader.dataset))  # type: ignore[arg-type]  # checked
        is_torchs_own = self._is_shuffled or type(sampler) is SequentialSampler
        self._listed = (
            None if is_torchs_own else ListedSampler(sampler, distributed, seed, in_batches=self._is_in_batches)
        )
        # Samples, or batches of a batch sampler, that all replicas take at a time.
        self._size = (1 if loader.batch_size is None else loader.batch_size) * distributed.replicas
        self._drop_last = loader.drop_last and not self._is_in_batches
        self._keeps_samples = has_default_collate(loader)
        # Processes that share a replica must load the same batch, and their own generators may differ.
        self._seeding = BatchSeeding(always=seed_every_batch or distributed.replica_size > 1)
        self._dataset = KeyedDataset(loader.dataset, get_collate_fn(loader), self._seeding, seed)
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
        order = f"{self._sampler}, drop_last" if self._drop_last else self._sampler
        return PartitionScheme(data, unit.format(self._size), allows_rebatching=True, order=order)

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
    def set_epoch(self, epoch: int) -> None:
        if self._is_training:
            self._dataset.set_epoch(epoch)

    @override
    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        self.set_epoch(epoch)
        if not self._is_training:  # it does not depend on evaluations before it, which a resumed run has not made
            self._seeding.reset()
        self._order = self._make_order(epoch)
        make_keys = self._key_sampler.make_keys = partial(self._make_keys, self._order, epoch, start)
        if self._loader.num_workers or self._loader.pin_memory:
            with HOST:  # torch draws the seed of workers, with a generator of the host
                loaded = map(unwrap_batch, start_iteration(self._loader))
            return self._host_batches(zip(make_keys(), loaded, strict=True), start)
        return self._host_batches(self._dataset.load_all(make_keys()), start)

    def _host_batches(self, loaded: Iterable[tuple[BatchKey, Any]], start: int) -> Iterator[HostBatch[Any]]:
        length, size, keeps_samples = self._length, self._size, self._keeps_samples
        has_keys = self._listed is not None and holds_keys(self._order, in_batches=self._is_in_batches)
        for end, (key, data) in zip(itertools.count(start + size, size), loaded, strict=False):
            indices = None if has_keys else key.indices
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
        length = self._num_samples
        if self._listed is not None:
            return cast(Sequence[Any], self._listed.order(epoch, length))
        return shuffle(self._seed, epoch, length) if self._is_shuffled else range(length)

    @override
    def state_dict(self) -> StateDict:
        sampler = {} if self._listed is None else self._listed.state_dict()
        return {"seeding": self._seeding.state_dict(), "sampler": sampler}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self._seeding.load_state_dict(state_dict["seeding"])
        if self._listed is not None:
            self._listed.load_state_dict(state_dict["sampler"])

    @override
    def close(self) -> None:
        stop_workers(self._loader)


class _BatchKeySampler:
    """The batch sampler of a loader that loads batches by their keys."""

    make_keys: Callable[[], Iterator[BatchKey]]

    def __iter__(self) -> Iterator[BatchKey]:
        return self.make_keys()


def holds_keys(order: Any, *, in_batches: bool) -> bool:
    """Return whether a listed order, of samples or of batches, consists of keys and not of places in the dataset."""
    samples = itertools.chain.from_iterable(order) if in_batches else iter(order)
    return isinstance(next(samples, None), str | tuple)


def summarize_last_sample(dataset: Any) -> list[float] | None:
    """Return a summary of the last sample, None if it differs each time it is loaded, or has no number as its index."""
    summaries = []
    for _ in range(2):
        with contextlib.suppress(LookupError, TypeError), streams_seeded(0):
            summaries.append(summarize(dataset[len(dataset) - 1]))
    return summaries[0] if len(summaries) == 2 and is_close(*summaries) else None

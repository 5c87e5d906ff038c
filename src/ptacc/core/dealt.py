"""Batches of a map-style dataset, dealt to the processes from an order that all of them know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler

from ptacc.core.data import HostBatch, check_dataset
from ptacc.core.fetch import KeyedDataset, probe
from ptacc.core.loaders import collate_of, given, is_torchs_collate, loader_settings, set_epoch
from ptacc.core.order import BatchKey, count_global_batches, deal_batches, deal_samples, global_batches
from ptacc.core.peers import Peers
from ptacc.core.randomness import derive_seed, permutation, streams_seeded
from ptacc.errors import DataError


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

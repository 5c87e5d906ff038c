"""Batches of a map-style dataset, dealt to the processes from an order that all of them know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler

from ptacc.core.data import Dealing, HostBatch, check_dataset
from ptacc.core.fetch import KeyedDataset, probe
from ptacc.core.loaders import collate_of, given, is_torchs_collate, loader_settings
from ptacc.core.order import BatchKey, count_global_batches, deal_batches, deal_samples, global_batches
from ptacc.core.samplers import ListedSampler
from ptacc.distributed.process_group import Peers
from ptacc.rng import permutation
from ptacc.types.protocols import StateDict


class DealtBatches:
    """A map-style dataset, whose order is dealt to the processes batch by batch."""

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        """Take over the loader's dataset, order and settings."""
        assert loader.batch_sampler is not None
        check_dataset(loader.dataset)
        self._peers, self._seed = peers, seed
        self._order = _Order(loader, peers, seed)
        self._keys = _Keys()
        self._dataset = KeyedDataset(loader.dataset, collate_of(loader))
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
    def dealing(self) -> Dealing:
        """From the order, which knows nothing of the number of processes, global batches can be cut anywhere."""
        return Dealing(self._order.parts, self._order.groups, goes_on_anew=True)

    def told(self) -> str:
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
            yield HostBatch(given(data), key.indices, key.samples, total, key.is_phantom, end)

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

    def __init__(self, loader: DataLoader[Any], peers: Peers, seed: int) -> None:
        self._peers, self._seed = peers, seed
        self.samples = len(loader.dataset)  # type: ignore[arg-type]  # checked: it has a length
        # A loader that was given a batch sampler has no batch size.
        self._is_in_batches = loader.batch_size is None
        sampler = loader.batch_sampler if self._is_in_batches else getattr(loader.batch_sampler, "sampler", None)
        self._is_shuffled = is_plain_shuffle(sampler, self.samples)
        is_torchs_own = self._is_shuffled or type(sampler) is SequentialSampler
        self._listed = None if is_torchs_own else ListedSampler(sampler, peers, seed)
        # What all replicas take of the order at a time: samples, or batches of a batch sampler.
        self._size = (1 if loader.batch_size is None else loader.batch_size) * peers.replicas
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
            return [deal_batches(group, replica, origin) for group, origin in zip(groups, origins, strict=True)]
        return [deal_samples(group, replica, replicas, origin) for group, origin in zip(groups, origins, strict=True)]

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

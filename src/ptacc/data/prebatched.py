"""Batches of a DataLoader whose batches cannot be split: they are assigned whole to the ranks in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from ptacc.data.batch import HostBatch, PartitionScheme
from ptacc.data.division import check_same_on_all_ranks, summarize
from ptacc.data.loading import known_length, set_epoch, stop_workers, unwrap_batch
from ptacc.data.partition import count_global_batches
from ptacc.data.replay import ReplaySource
from ptacc.data.workers import start_iteration
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.rng import derive_seed, streams_seeded


class PrebatchedSource(ReplaySource):
    """A loader that is used as it is: each rank takes whole batches of it, in turn. Offsets are numbers of batches."""

    def __init__(
        self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int, *, is_training: bool = True
    ) -> None:
        super().__init__(loader)
        self._loader, self._seed, self._is_training = loader, seed, is_training
        self._distributed = distributed
        self._replica, self._replicas = distributed.replica, distributed.replicas

    @override
    def num_batches(self, start: int = 0) -> int | None:
        length = known_length(self._loader)
        if length is None:
            return None
        return count_global_batches(max(length - start, 0), self._replicas, drop_last=False)

    @override
    def offset_after(self, batches: int) -> int:
        return batches * self._replicas

    @property
    @override
    def partition_scheme(self) -> PartitionScheme:
        data = f"batches of {type(self._loader).__name__}"
        return PartitionScheme(data, f"{self._replicas} at a time", allows_rebatching=True)

    @override
    def fingerprint(self) -> str:
        return ""  # a loader of another type need not describe itself

    @override
    def set_epoch(self, epoch: int) -> None:
        was_set = self._is_training and set_epoch(self._loader, epoch, self._seed)
        if was_set and getattr(self._loader, "persistent_workers", False):
            stop_workers(self._loader)  # they have copies of the dataset, which cannot be reached

    @override
    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        self.set_epoch(epoch)
        return self._load(epoch, start)

    def _load(self, epoch: int, start: int) -> Iterator[HostBatch[Any]]:
        self._start_epoch(start)
        batches: Iterator[Any] | None = None
        end = 0
        while True:
            size = min(self._replicas, start - end) if end < start else self._replicas
            with streams_seeded(derive_seed(self._seed, epoch, end // self._replicas)):
                batches = start_iteration(self._loader) if batches is None else batches
                group = [batch for _, batch in zip(range(size), batches, strict=False)]
            if end == 0 and self._distributed.rendezvous is not None:
                check_same_on_all_ranks(self._distributed, self._owner_name, summarize(group))
            if not group:
                return
            end += len(group)
            is_padding = self._replica >= len(group)
            batch = unwrap_batch(group[0 if is_padding else self._replica])
            self._check_replayed(batch, end)
            if end > start:
                yield HostBatch(batch, None, None, None, is_padding, end)

"""Batches of a DataLoader whose batches cannot be split: they are assigned whole to the ranks in turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ptacc.data.batch import HostBatch, PartitionScheme
from ptacc.data.loading import require_batch, set_epoch
from ptacc.data.partition import count_global_batches
from ptacc.data.replay import ReplaySource
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.rng import derive_seed, streams_seeded


class PrebatchedSource(ReplaySource):
    """A loader that cannot be taken apart: its batches are dealt whole, one to each process in turn."""

    def __init__(self, loader: DataLoader[Any], distributed: DistributedRuntime, seed: int) -> None:
        """Keep the loader."""
        super().__init__(loader)
        self._loader, self._peers, self._seed = loader, distributed, seed

    def num_batches(self, start: int = 0) -> int | None:
        """Return the batches of an epoch from `start` on, None where the loader has no length."""
        try:
            return count_global_batches(max(len(self._loader) - start, 0), self._peers.replicas, drop_last=False)
        except TypeError:
            return None

    def place_after(self, batches: int) -> int:
        """Return the number of the loader's batches."""
        return batches * self._peers.replicas

    @property
    def partition_scheme(self) -> PartitionScheme:
        """Batches are whole, and can be dealt to any number of processes."""
        return PartitionScheme(f"batches of {type(self._loader).__name__}", f"{self._peers.replicas} at a time", True)

    def fingerprint(self) -> str:
        """Tell nothing: loaders of one's own may have any form."""
        return ""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[HostBatch[Any]]:
        """Iterate over the batches of one epoch."""
        set_epoch(self._loader, epoch)
        expected = self._begin(start)
        batches: Iterator[Any] | None = None
        end = 0
        while True:
            size = min(self._peers.replicas, start - end) if end < start else self._peers.replicas
            with streams_seeded(derive_seed(self._seed, epoch, end // self._peers.replicas)):
                batches = iter(self._loader) if batches is None else batches
                group = [batch for _, batch in zip(range(size), batches, strict=False)]
            if not group:
                return
            end += len(group)
            is_padding = self._peers.replica >= len(group)
            mine = require_batch(group[0 if is_padding else self._peers.replica])
            if end > start:
                yield HostBatch(self._give(mine), None, None, None, is_padding, end)
            elif end == start:
                self._check(mine, expected)

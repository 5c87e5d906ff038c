"""Sources: a loader is taken apart, and its batches are dealt to the processes.

Its dataset, order and collate function are kept. Loading a batch draws from generators seeded for that batch alone,
wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ptacc.data.batch import BatchSource
from ptacc.data.iterable import IterableSource
from ptacc.data.map_style import MapStyleSource
from ptacc.data.prebatched import PrebatchedSource
from ptacc.data.wrappers import LimitedSource, PaddedSource
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError


def make_source(
    loader: DataLoader[Any],
    distributed: DistributedRuntime,
    seed: int,
    *,
    data_is_sharded: bool = False,
    limit: int | None = None,
) -> BatchSource:
    """Take a loader apart into the batches of this process, which hears nothing of the others yet: see `level`.

    Args:
        loader: The loader, made by a trainer or by the user.
        distributed: The processes to deal to.
        seed: The run's seed, from which orders and loading draw.
        data_is_sharded: Whether the loader of each process has its own data already.
        limit: Batches to take of each epoch, all if None.

    Raises:
        DataError: Processes that share a replica of the model have data of their own.
    """
    dealt_to = DistributedRuntime() if data_is_sharded else distributed
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not distributed.is_single_process and not data_is_sharded:
        dealt_to = DistributedRuntime()
    if dealt_to is not distributed and distributed.replica_size > 1:
        raise DataError(
            f"Each process has its own data, but {distributed.replica_size} processes share a replica of the model and "
            "need the same batches. Give every process the whole data, without data_is_sharded and samplers."
        )
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        source: BatchSource = PrebatchedSource(loader, dealt_to, seed)
    elif isinstance(loader.dataset, IterableDataset):
        source = IterableSource(loader, dealt_to, seed)
    else:
        source = MapStyleSource(loader, dealt_to, seed)
    if limit is not None:
        source = LimitedSource(source, limit)
    return (
        PaddedSource(source, distributed)
        if dealt_to is not distributed and not distributed.is_single_process
        else source
    )


def fingerprints(sources: Mapping[str, BatchSource]) -> list[str]:
    """Tell of several sets of data what has to be the same on all processes."""
    return [f"{name} {told}".strip() for name, source in sources.items() if (told := source.fingerprint())]

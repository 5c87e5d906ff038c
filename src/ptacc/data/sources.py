"""From a DataLoader to this rank's batches.

The loader's dataset, order and collate function are kept. The random numbers drawn while a batch is loaded depend on
the run's seed and the batch only, wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from ptacc.data.batch import BatchSource
from ptacc.data.division import check_not_dispatched, find_division
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
    is_training: bool = True,
    seed_every_batch: bool = False,
) -> BatchSource:
    """Make the source of this rank's batches, without communication: call `sync_sources` before it is used.

    Args:
        loader: The loader, made by the trainer or by the user.
        distributed: The ranks to split the data over.
        seed: The run's seed, which determines the order of samples and all random numbers drawn in loading.
        data_is_sharded: Whether the loader of each rank has its own part of the data already.
        limit: Number of batches to take of each epoch, all if None.
        is_training: Whether to call `set_epoch`. An evaluation must not: its data may be a part of the training data.
        seed_every_batch: See `TrainOptions`.

    Raises:
        DataError: Each rank has its own data, but several ranks share a replica of the model. Or the data is divided
            into other parts than those of the ranks.
    """
    if not (data_is_sharded or distributed.is_single_process):
        check_not_dispatched(loader)
        if division := find_division(loader):
            division.check(distributed)
            data_is_sharded = True
    if data_is_sharded and distributed.replica_size > 1:
        raise DataError(
            f"Each process has its own data, but {distributed.replica_size} processes share a replica of the model and "
            "need the same batches. Give every process the whole data, without data_is_sharded and samplers."
        )
    split_over = DistributedRuntime() if data_is_sharded else distributed
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        source: BatchSource = PrebatchedSource(loader, split_over, seed, is_training=is_training)
    elif isinstance(loader.dataset, IterableDataset):
        source = IterableSource(loader, split_over, seed, is_training=is_training)
    else:
        source = MapStyleSource(loader, split_over, seed, is_training=is_training, seed_every_batch=seed_every_batch)
    if limit is not None:
        source = LimitedSource(source, limit)
    needs_padding = data_is_sharded and not distributed.is_single_process
    return PaddedSource(source, distributed) if needs_padding else source


def fingerprints(sources: Mapping[str, BatchSource]) -> list[str]:
    """Describe what must be the same on all ranks, for each dataset that all ranks share."""
    return [f"{name} {shared}".strip() for name, source in sources.items() if (shared := source.fingerprint())]

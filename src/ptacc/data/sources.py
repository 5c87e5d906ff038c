"""Sources: a loader is taken apart, and its batches are dealt to the processes.

Its dataset, order and collate function are kept. Loading a batch draws from generators seeded for that batch alone,
wherever it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ptacc.data.batch import BatchSource
from ptacc.data.iterable import StreamBatches
from ptacc.data.map_style import DealtBatches
from ptacc.data.prebatched import ReadyBatches
from ptacc.data.wrappers import LevelledBatches, LimitedBatches
from ptacc.distributed.process_group import Peers
from ptacc.errors import DataError
from ptacc.types.aliases import Sharding


def source_of(
    loader: DataLoader[Any], peers: Peers, seed: int, *, sharding: Sharding = "auto", limit: int | None = None
) -> BatchSource:
    """Take a loader apart into the batches of this process, which hears nothing of the others yet: see `level`.

    Args:
        loader: The loader, made by a trainer or by the user.
        peers: The processes to deal to.
        seed: The run's seed, from which orders and loading draw.
        sharding: `"already"` where the loader of each process has its own data already.
        limit: Batches to take of each epoch, all if None.

    Raises:
        DataError: Processes that share a replica of the model have data of their own.
    """
    dealt_to = Peers() if sharding == "already" else peers
    sampler = getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not peers.is_alone and sharding == "auto":
        dealt_to = Peers()
    if dealt_to is not peers and peers.replica_size > 1:
        raise DataError(
            f"Each process has data of its own, and {peers.replica_size} share a replica of the model, which takes the "
            "same batches on all of them. Give every process the whole data, and leave sharding and samplers out."
        )
    if type(loader) is not DataLoader or loader.batch_sampler is None:
        source: BatchSource = ReadyBatches(loader, dealt_to, seed)
    elif isinstance(loader.dataset, IterableDataset):
        source = StreamBatches(loader, dealt_to, seed)
    else:
        source = DealtBatches(loader, dealt_to, seed)
    if limit is not None:
        source = LimitedBatches(source, limit)
    return LevelledBatches(source, peers) if dealt_to is not peers and not peers.is_alone else source


def tell(sources: Mapping[str, BatchSource]) -> list[str]:
    """Tell of several sets of data what has to be the same on all processes."""
    return [f"{name} {told}".strip() for name, source in sources.items() if (told := source.told())]

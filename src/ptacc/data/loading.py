"""Loading one batch, in this process or in a worker: seeding, collating and pinning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torch.utils.data import default_collate as torch_default_collate

from ptacc.rng import HOST_STREAMS, derive_seed, streams_seeded
from ptacc.tensors.structures import pin_memory

CollateFn: TypeAlias = Callable[[list[Any]], object]
DATASETS = frozenset({"dataset", "datasets"})
SAMPLERS = frozenset({"sampler", "batch_sampler"})
"""Attributes in which torch's classes, and those that follow them, hold datasets and samplers."""
SET_EPOCH = -1
"""Takes the place of a batch in the seed of the random numbers that `set_epoch` draws."""


def identity(batch: object) -> object:
    """Return a batch that is collated already."""
    return batch


def default_collate(samples: list[Any]) -> object:
    """Collate as torch does, except that tuples give a tuple, not a list."""
    if type(samples[0]) is tuple:
        with contextlib.suppress(ValueError):  # samples of differing lengths, for which torch has the message
            fields: list[Any] = [*zip(*samples, strict=True)]
            return tuple([torch_default_collate(values) for values in fields])
    batch = torch_default_collate(samples)
    return tuple(batch) if isinstance(batch, list) and isinstance(samples[0], tuple) else batch


@contextlib.contextmanager
def seeded_loading(seed: int) -> Generator[None]:
    """Seed the generators of the host while one batch is loaded. Only the main process restores them afterwards."""
    if get_worker_info() is not None:
        for stream in HOST_STREAMS.values():
            stream.seed(seed)
        yield
    else:
        with streams_seeded(seed):
            yield


def set_epoch(target: object, epoch: int, seed: int, within: Set[str] = DATASETS | SAMPLERS) -> bool:
    """Call `set_epoch` of a dataset, sampler or loader, or else of what it holds, once each.

    They draw the same random numbers in every process, also in one that resumes the run.

    Args:
        target: The dataset, sampler or loader.
        epoch: The epoch, counted from 0.
        seed: The run's seed.
        within: See `find_epoch_owners`.

    Returns:
        Whether there was one.
    """
    owners = list(find_epoch_owners(target, within))
    with streams_seeded(derive_seed(seed, epoch, SET_EPOCH)) if owners else contextlib.nullcontext():
        for owner in owners:
            owner.set_epoch(epoch)
    return bool(owners)


def find_epoch_owners(target: object, within: Set[str] = DATASETS | SAMPLERS) -> Iterator[Any]:
    """Iterate over a dataset, sampler or loader and what it holds: those with a `set_epoch`, once each.

    An object with a `set_epoch` is responsible for what it holds.

    Args:
        target: The dataset, sampler or loader.
        within: Names of the attributes in which it may hold others. One of any other name may hold a torch dataset.
    """
    found, visited = [target], dict[int, object]()
    while found:
        owner = found.pop()
        if id(owner) in visited:
            continue
        visited[id(owner)] = owner
        if callable(getattr(owner, "set_epoch", None)):
            yield owner
            continue
        attributes = getattr(owner, "__dict__", {})  # a property might open a file
        for name, value in attributes.items():
            if name in within:
                values = value.values() if isinstance(value, Mapping) else value
                found += values if isinstance(value, list | tuple | Mapping) else [value]
            elif isinstance(value, Dataset):
                found.append(value)


def known_length(data: Any) -> int | None:
    """Return the length of a dataset, sampler or loader, None if its `__len__` raises as torch's do, or is missing."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def stop_workers(loader: Any) -> None:
    """Stop the workers that a loader keeps between epochs. The next iteration starts others."""
    iterator, loader._iterator = getattr(loader, "_iterator", None), None  # noqa: SLF001  # torch has no other way
    if iterator is not None:
        iterator._shutdown_workers()  # noqa: SLF001


def get_collate_fn(loader: DataLoader[Any]) -> CollateFn:
    """Return the loader's collate function, with torch's own replaced by one that keeps tuples."""
    return default_collate if has_default_collate(loader) else loader.collate_fn


def has_default_collate(loader: DataLoader[Any]) -> bool:
    """Return whether the loader collates as torch does by default. A user's function may leave out samples."""
    return loader.collate_fn is torch.utils.data.default_collate


def get_loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the settings of a loader for one that is given collated batches: all but those on the order of samples."""
    wrap_batch = wrap_first if isinstance(loader.dataset, IterableDataset) else Pinnable
    settings: dict[str, Any] = {
        "collate_fn": wrap_batch if loader.pin_memory else identity,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "persistent_workers": loader.persistent_workers,
        "generator": torch.Generator(),
    }
    return settings | ({"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {})


@dataclass(frozen=True, slots=True)
class Pinnable:
    """Wraps a batch so that torch's loader pins tensors in every structure that a batch may have."""

    batch: Any

    def pin_memory(self) -> Pinnable:
        """Return the batch in pinned memory. Called by torch's loader."""
        return Pinnable(pin_memory(self.batch))


def wrap_first(item: tuple[object, ...]) -> tuple[object, ...]:
    """Wrap the batch of an item of a stream, which holds numbers of samples, too."""
    batch, *numbers = item
    return Pinnable(batch), *numbers


def unwrap_batch(data: Any) -> Any:
    """Return the batch that was loaded, None if the collate function left it out."""
    return data.batch if isinstance(data, Pinnable) else data

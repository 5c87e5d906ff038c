"""Loading one batch: the datasets that a dealt loader reads from, in this process or in a worker."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import default_collate as torch_default_collate
from typing_extensions import TypeVar

from ptacc.errors import DataError
from ptacc.rng import seed_everything, streams_seeded
from ptacc.tensors.structures import pin_memory

Collate = Callable[[list[Any]], object]


def identity(batch: object) -> object:
    """Return a batch that is collated already."""
    return batch


def default_collate(samples: list[Any]) -> object:
    """Collate as torch does, except that tuples give a tuple, not a list."""
    batch = torch_default_collate(samples)
    return tuple(batch) if isinstance(batch, list) and isinstance(samples[0], tuple) else batch


@contextlib.contextmanager
def seeded_loading(seed: int) -> Iterator[None]:
    """Seed the global generators for loading one batch: a worker's are its own, this process's are put back."""
    if get_worker_info() is not None:
        seed_everything(seed)
        yield
    else:
        with streams_seeded(seed):
            yield


ResultT = TypeVar("ResultT")


def set_epoch(target: object, epoch: int) -> None:
    """Tell a sampler, dataset or loader that wants to know which epoch it is."""
    setter = getattr(target, "set_epoch", None)
    if callable(setter):
        setter(epoch)


def get_collate_fn(loader: DataLoader[Any]) -> Callable[[list[Any]], object]:
    """Return the user's collate function, or torch's own with tuples left tuples."""
    return default_collate if is_torchs_collate(loader) else loader.collate_fn


def is_torchs_collate(loader: DataLoader[Any]) -> bool:
    """Say whether a batch has all samples that were loaded for it: a collate function of the user's may drop some."""
    return loader.collate_fn is torch.utils.data.default_collate


def loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the settings of a loader that have nothing to do with which samples are in which batch."""
    of_batch = pinnable_first if isinstance(loader.dataset, IterableDataset) else Pinnable
    settings: dict[str, Any] = {
        "collate_fn": of_batch if loader.pin_memory else identity,
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
    """A batch on its way to be pinned: torch's loaders look into fewer kinds of structures than batches may have."""

    batch: Any

    def pin_memory(self) -> Pinnable:
        """Return the batch pinned. Loaders call this, in a thread of their own where they have workers."""
        return Pinnable(pin_memory(self.batch))


def pinnable_first(part: tuple[object, int, int]) -> tuple[object, int, int]:
    """Have the batch pinned that a stream gives with its numbers of samples."""
    batch, mine, total = part
    return Pinnable(batch), mine, total


def require_batch(data: ResultT | None) -> ResultT:
    """Return a batch, unless the collate function forgot to."""
    if isinstance(data, Pinnable):
        data = data.batch
    if data is None:
        raise DataError("A batch is None: the collate function returned nothing. Check that it ends in `return batch`.")
    return data

"""The samplers of loaders."""

from __future__ import annotations

import copy
import hashlib
import warnings
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import RandomSampler

from ptacc.data.loading import SAMPLERS, known_length, set_epoch
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.rng import derive_seed, streams_seeded
from ptacc.tensors.devices import HOST
from ptacc.types.protocols import StateDict, Stateful

ENDLESS = 10
"""A sampler that gives this many times its length is taken as endless: an epoch is as long as its `__len__` says."""


class ListedSampler:
    """A user's sampler or batch sampler, whose order is listed on rank 0 when an epoch begins, and broadcast.

    Its random numbers are derived from the run's seed.

    A sampler's order may depend on the epochs before. A `Stateful` sampler resumes from its saved state; any other is
    iterated once for each earlier epoch.
    """

    def __init__(self, sampler: Any, distributed: DistributedRuntime, seed: int, *, in_batches: bool = False) -> None:
        self._sampler: Any = sampler
        self._in_batches = in_batches
        self._stateful = sampler if isinstance(sampler, Stateful) else None
        self._distributed, self._seed = distributed, seed
        self._next_epoch = 0
        self._state_at_start: StateDict = {}
        self._saved: StateDict = {}

    def __len__(self) -> int:
        length = known_length(self._sampler)
        if length is None:
            raise DataError(
                f"{type(self._sampler).__name__} has no length: a run is planned by the batches of an epoch. "
                "Give the sampler a __len__, or yield the samples from an IterableDataset."
            )
        return length

    def order(self, epoch: int, samples: int) -> Any:
        """Return the order of an epoch of a dataset with a number of samples. A collective."""
        return self._distributed.broadcast(self._list(epoch, samples) if self._distributed.rank == 0 else None)

    def _list(self, epoch: int, samples: int) -> list[Any]:
        saved, self._saved = self._saved, {}
        is_within_epoch = saved.get("epoch") == epoch
        if self._stateful is not None:
            self._next_epoch = epoch
            if saved:
                self._stateful.load_state_dict(saved["before" if is_within_epoch else "now"])
            self._state_at_start = copy.deepcopy(self._stateful.state_dict())
        order: list[Any] = []
        for number in range(min(self._next_epoch, epoch), epoch + 1):
            set_epoch(self._sampler, number, self._seed, SAMPLERS)
            with HOST, streams_seeded(derive_seed(self._seed, number)):
                order = self._list_epoch(samples)
        self._next_epoch = epoch + 1
        if self._stateful is not None and is_within_epoch:
            self._stateful.load_state_dict(saved["now"])
        return order

    def _list_epoch(self, samples: int) -> list[Any]:
        length = max(len(self), 1)
        order = list(islice(self._sampler, ENDLESS * length))
        if len(order) < ENDLESS * length:
            return order
        if (sum(map(len, order[:length])) if self._in_batches else length) < samples:
            name, unit = type(self._sampler).__name__, "batches" if self._in_batches else "samples"
            warnings.warn(
                f"{name} has a length of {length} {unit}, and gave {len(order)} without an end, of a dataset of "
                f"{samples} samples. It is taken as endless: an epoch has its first {length}. If it has an end, "
                "correct its __len__.",
                stacklevel=2,
            )
        return order[:length]

    def state_dict(self) -> StateDict:
        """Return the state of a `Stateful` sampler before and after the current epoch was listed."""
        if self._stateful is None:
            return {}
        now = copy.deepcopy(self._stateful.state_dict())
        return {"epoch": self._next_epoch - 1, "before": self._state_at_start, "now": now}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore a state, which takes effect when the next order is listed."""
        self._saved = state_dict


def is_plain_shuffle(sampler: object, samples: int) -> bool:
    """Return whether a sampler is what `shuffle=True` makes."""
    return type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == samples


def describe_sampler(sampler: object) -> str:
    """Return the class of a sampler, and what one of torch's own was created with."""
    kind = type(sampler)
    names = ("replacement", "weights", "indices") if kind.__module__.startswith("torch.") else ()
    values = {name: getattr(sampler, name, None) for name in names}
    settings = [
        f"{name}={value if isinstance(value, bool) else digest(value)}"
        for name, value in values.items()
        if value is not None
    ]
    return f"{kind.__name__}({', '.join(settings)})"


def digest(values: Any) -> str:
    """Return a hash of the numbers or keys of a sampler, the same in each process."""
    try:
        data: Any = np.ascontiguousarray(values, dtype=np.float64)
    except (TypeError, ValueError):  # keys
        data = repr(list(values)).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()

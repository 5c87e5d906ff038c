"""Data that is divided between the processes already: recognised by who divides it, or by samples that differ."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError
from ptacc.tensors.structures import iterate_leaves, iterate_tensors


@dataclass(frozen=True, slots=True)
class Division:
    """What divides the data of a loader: a sampler, such as torch's `DistributedSampler`, or the dataset.

    Args:
        owner: The sampler or dataset.
        parts: Number of parts.
        index: The part of this process.
    """

    owner: object
    parts: int
    index: int

    def check(self, distributed: DistributedRuntime) -> None:
        """Raise `DataError` if the parts are not those of the processes."""
        if (self.parts, self.index) != (distributed.world_size, distributed.rank):
            raise DataError(
                f"{type(self.owner).__name__} gives part {self.index} of {self.parts} to rank {distributed.rank} of "
                f"{distributed.world_size} processes: samples would be left out. Make it with the rank and the number "
                "of processes, or leave it out, as ptacc divides the data itself."
            )


def find_division(loader: DataLoader[Any]) -> Division | None:
    """Return what divides a loader's data, None if nothing is known to.

    It has the attributes `num_replicas` and `rank`, as samplers of torch, torchdata, transformers and timm, or
    `num_processes` and `process_index`, as those of Accelerate.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (batch_sampler, getattr(batch_sampler, "sampler", None), getattr(loader, "sampler", None))
    for owner in (*samplers, loader.dataset):
        for names in (("num_replicas", "rank"), ("num_processes", "process_index")):
            parts, index = (getattr(owner, name, None) for name in names)
            if isinstance(parts, int) and isinstance(index, int) and parts > 1:
                return Division(owner, parts, index)
    return None


def check_not_dispatched(loader: DataLoader[Any]) -> None:
    """Raise `DataError` for Accelerate's loader that reads on rank 0 and sends each process its part."""
    if any(base.__name__ == "DataLoaderDispatcher" for base in type(loader).__mro__):
        raise DataError(
            "The DataLoader was prepared by Accelerate, and divides its batches between the processes already. Give "
            "the loader as it was before `accelerator.prepare`: ptacc divides its batches itself."
        )


def summarize(samples: object) -> list[float]:
    """Return a few numbers that describe samples. Hosts whose arithmetic differs get nearly the same numbers.

    Strings count only where there are no tensors: they may be paths, which differ between hosts.
    """
    tensors: list[Any] = list(iterate_tensors(samples))
    summary: list[float] = []
    for leaf in tensors or [leaf for _, leaf in iterate_leaves(samples)]:
        if isinstance(leaf, str | bytes):
            summary.append(zlib.crc32(leaf.encode() if isinstance(leaf, str) else leaf))
        elif isinstance(leaf, Tensor | int | float) or hasattr(leaf, "__array_interface__"):
            value = leaf if isinstance(leaf, Tensor) else torch.from_numpy(np.asarray(leaf, dtype=np.float64))
            numbers = value.detach().cpu().double().flatten()
            weights = torch.linspace(1, 2, len(numbers), dtype=torch.float64, device="cpu")
            summary += [float(len(numbers)), float(numbers.sum()), float((numbers * weights).sum())]
    return summary


def check_same_on_all_ranks(distributed: DistributedRuntime, name: str, summary: Sequence[float] | None) -> None:
    """Compare the samples of all ranks, by their summaries. None: this rank does not know. A collective.

    Raises:
        DataError: They differ.
    """
    known = [found for found in distributed.gather(summary) if found is not None]
    if not all(is_close(known[0], other) for other in known[1:]):
        raise DataError(
            f"The processes read different samples from {name}. Either it is divided between them already, and parts "
            "would be left out: give the undivided data, or pass data_is_sharded=True. Or its order differs between "
            "them: give it the same seed on every process."
        )


def is_close(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two summaries are equal, up to rounding."""
    if len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b)) for a, b in pairs)

"""A job: the model, the optimizer and the data that each contender receives."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from typing_extensions import override

SEED = 0
NOISE = 1e-5
"""The size of augmentations. It is small, so that contenders that draw other numbers still have similar weights."""


@dataclass(frozen=True)
class Job:
    """A model to train with an optimizer on the batches of a loader.

    Args:
        model: The model with its initial weights.
        optimizer: The optimizer. Its learning rate is constant unless `make_schedule` is used.
        loss_func: Returns the mean loss of a batch from (outputs, targets).
        loader: The batches `(inputs, targets)`, in a different order in each epoch.
        eval_loader: The batches for evaluations during training.
        epochs: The number of passes over the loader. An evaluation is one pass over data repeated this many times.
        folder: A folder for files.
    """

    model: nn.Module
    optimizer: Optimizer
    loss_func: Callable[[Tensor, Tensor], Tensor]
    loader: DataLoader[Any]
    eval_loader: DataLoader[Any]
    epochs: int
    folder: Path

    @property
    def steps(self) -> int:
        """The number of batches in all epochs."""
        return self.epochs * len(self.loader)

    @property
    def dataset(self) -> TensorDataset:
        """The in-memory dataset of the loader."""
        assert isinstance(self.loader.dataset, TensorDataset)
        return self.loader.dataset

    @property
    def batch_size(self) -> int:
        """The number of samples per batch."""
        assert self.loader.batch_size is not None
        return self.loader.batch_size

    def make_schedule(self, optimizer: Optimizer) -> CosineAnnealingLR:
        """Create the schedule for workloads with a schedule."""
        return CosineAnnealingLR(optimizer, T_max=self.steps)


Run = Callable[[Job], float]
"""Runs a job, and returns the mean loss that the contender reports, or NaN if it reports none."""


class FixedShuffle(Sampler[int]):
    """A shuffled order that depends only on the epoch.

    Several contenders replace torch's `RandomSampler` with their own sampler. This class prevents that, so that all
    contenders use the same order and end with the same weights.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._generator = torch.Generator().manual_seed(SEED)

    def __len__(self) -> int:
        return self.samples

    @override
    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.samples, generator=self._generator).tolist()


class PtaccOrder(Sampler[int]):
    """The shuffled order of ptacc, for a plain loop that trains on the same batches."""

    def __init__(self, samples: int) -> None:
        self.samples, self._epoch = samples, 0

    def __len__(self) -> int:
        return self.samples

    @override
    def __iter__(self) -> Iterator[int]:
        from ptacc.testing import epoch_order

        order = epoch_order(SEED, self._epoch, self.samples)
        self._epoch += 1
        yield from order


class RankShard(Sampler[int]):
    """The share of one rank of each global batch."""

    def __init__(self, order: FixedShuffle, batch_size: int, rank: int, world_size: int) -> None:
        self._order, self._size, self._rank, self._world_size = order, batch_size, rank, world_size

    def __len__(self) -> int:
        return len(self._order) // self._world_size

    @override
    def __iter__(self) -> Iterator[int]:
        for position, index in enumerate(self._order):
            if position // self._size % self._world_size == self._rank:
                yield index


class SampleDataset(Dataset[tuple[Tensor, Tensor]]):
    """A custom dataset that returns single samples."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class AugmentedDataset(SampleDataset):
    """A custom dataset that draws from the global generators of Python, NumPy and torch for each sample."""

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, target = super().__getitem__(index)
        size = NOISE * random.random() * np.random.random()  # noqa: NPY002
        return torch.add(inputs, torch.randn(inputs.shape), alpha=size), target


class BatchDataset(SampleDataset):
    """A custom dataset that returns a collated batch in `__getitems__`. Use it with `return_unchanged`."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        selected = torch.tensor(indices)
        return self.inputs[selected], self.targets[selected]


def return_unchanged(batch: Any) -> Any:
    """Collate a batch that is already collated."""
    return batch

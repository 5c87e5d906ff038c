"""A job: one model to train or to evaluate, as every contender is given it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from typing_extensions import override

SEED = 0


@dataclass(frozen=True)
class Job:
    """What a contender is handed: it trains this very model with this very optimizer on this loader's batches.

    Args:
        model: The model, with its initial weights.
        optimizer: Its optimizer, with a constant learning rate unless `make_schedule` is asked for one.
        loss_func: The mean loss of a batch from (outputs, targets).
        loader: The batches `(inputs, targets)`, in an order of its own in each epoch.
        eval_loader: Further batches, for workloads that evaluate.
        epochs: Passes over the loader; an evaluation is one pass, over data that was repeated so often.
        folder: Where files may be written.
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
        """Batches of all epochs together."""
        return self.epochs * len(self.loader)

    @property
    def dataset(self) -> TensorDataset:
        """The data in memory, for whoever makes a loader of it."""
        assert isinstance(self.loader.dataset, TensorDataset)
        return self.loader.dataset

    @property
    def batch_size(self) -> int:
        """Samples of a batch."""
        assert self.loader.batch_size is not None
        return self.loader.batch_size

    def make_schedule(self, optimizer: Optimizer) -> CosineAnnealingLR:
        """Make the schedule of the workload that has one."""
        return CosineAnnealingLR(optimizer, T_max=self.steps)


Run = Callable[[Job], float]
"""Does a job, and returns its mean loss as the contender knows it; NaN where it keeps none."""


class Shuffled(Sampler[int]):
    """What `shuffle=True` does, in an order that depends on nothing but the epoch.

    A class of its own, since several contenders put a sampler of theirs in the place of torch's `RandomSampler`: the
    order, and with it the weights, would not be the same any more.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._generator = torch.Generator().manual_seed(SEED)

    def __len__(self) -> int:
        return self.samples

    @override
    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.samples, generator=self._generator).tolist()


class AsPtaccShuffles(Sampler[int]):
    """The order in which ptacc shuffles by default, for a plain loop that is to train on the same batches."""

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


class Dealt(Sampler[int]):
    """One rank's part of each global batch."""

    def __init__(self, order: Shuffled, batch_size: int, rank: int, world_size: int) -> None:
        self._order, self._size, self._rank, self._world_size = order, batch_size, rank, world_size

    def __len__(self) -> int:
        return len(self._order) // self._world_size

    @override
    def __iter__(self) -> Iterator[int]:
        for place, index in enumerate(self._order):
            if place // self._size % self._world_size == self._rank:
                yield index


class SampleBySample(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of the user's own, asked for one sample after the other."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class BatchAtOnce(SampleBySample):
    """A dataset of the user's own that takes a whole batch out of its tensors at once: see `as_it_is`."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        return self.inputs[chosen], self.targets[chosen]


def as_it_is(batch: Any) -> Any:
    """Collate what is a batch already."""
    return batch

"""The values of a step, how they are read from the device, and their means over several steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add, mul
from typing import TypeAlias

import torch
from torch import Tensor

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.tensors.devices import widest_float
from ptacc.types.protocols import StateDict

NO_LOSS = torch.zeros((), device="cpu")
"""The loss of a step before its first batch."""
Sums: TypeAlias = dict[str, tuple[float, float]]
"""Sums of values by name, each with its weight: the mean is their ratio."""


@dataclass(slots=True)
class StepResult:
    """The values of one step, still on the device.

    Args:
        step: Number of the step, from 1.
        epoch: Number of its epoch, from 1.
        items: Number of items of the step, over all ranks.
        learning_rate: Learning rate of the step.
        loss: Scalar on the device. Its mean over the ranks is the mean loss of the step.
        logged: Further scalars, as floats or tensors on the device, averaged over the ranks likewise.
        weights: The fraction of the items to which a logged value applies, for values that some batches did not log.
        group_rates: Learning rates of the parameter groups by name, if there are several.
    """

    step: int
    epoch: int
    items: float
    learning_rate: float | Tensor
    loss: Tensor = NO_LOSS
    logged: dict[str, Tensor | float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    group_rates: Mapping[str, float | Tensor] = field(default_factory=dict)

    def add(self, loss: Tensor, logged: Mapping[str, Tensor], weight: float) -> None:
        """Add a batch: its scaled loss, and means over the batch with their weight in the means over the step.

        Sums are at least in float32. In bfloat16, they would not change any more after some hundred batches.
        """
        self.loss = loss if self.loss is NO_LOSS else widen(self.loss) + loss
        for name, value in logged.items() if weight else ():  # a mean over no items is NaN
            self._add_logged(name, widen(value.detach()) * weight, weight)

    def add_update(self, name: str, loss: Tensor, logged: Mapping[str, Tensor], weight: float) -> None:
        """Add a batch in one of several updates, whose own mean loss is reported by `name`."""
        self.add(loss, logged, weight)
        if weight:
            self._add_logged(name, widen(loss), weight)

    def _add_logged(self, name: str, value: Tensor, weight: float) -> None:
        self.logged[name] = self.logged.get(name, 0.0) + value
        self.weights[name] = self.weights.get(name, 0.0) + weight


@dataclass(slots=True)
class LoggedValues:
    """Values of `trainer.log` on this rank that are not read yet: sums on the device, and their counts."""

    sums: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values, each to those of its name."""
        for name, value in values.items():
            value = widen(value.detach()) if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0.0) + 1.0

    def as_result(self, loss: Tensor) -> StepResult:
        """Return them in the form of a step without items, to be read together with steps."""
        return StepResult(0, 0, 0.0, 0.0, loss, self.sums, self.counts)


@dataclass(slots=True)
class StepMeans:
    """Sums over steps, for their means.

    Args:
        loss_sum: Sum of the losses of all items.
        items: Number of items.
        logged: Sums of logged values, each with the number of steps that logged it.
    """

    loss_sum: float = 0.0
    items: float = 0.0
    logged: Sums = field(default_factory=dict)

    def add(self, losses: Sequence[float], items: Sequence[float], logged: Iterable[Mapping[str, float]]) -> None:
        """Add steps: their mean losses, their items, and their logged values.

        They are added one after the other, so that the sums do not depend on how many are added at a time.
        """
        self.loss_sum = reduce(add, map(mul, losses, items), self.loss_sum)
        self.items = reduce(add, items, self.items)
        for values in filter(None, logged):
            add_sums(self.logged, {name: (value, 1.0) for name, value in values.items()})

    @property
    def loss(self) -> float:
        """Mean loss over the items, NaN if there are none."""
        return self.loss_sum / self.items if self.items else math.nan

    def state_dict(self) -> StateDict:
        """Return the sums."""
        return asdict(self)


def widen(value: Tensor) -> Tensor:
    """Return a value in float32 if its type is narrower."""
    return value.float() if value.dtype.itemsize < 4 else value


def add_sums(sums: Sums, more: Sums) -> None:
    """Add sums to those of the same names."""
    for name, (value, weight) in more.items():
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = total + value, count + weight


def means(sums: Sums) -> dict[str, float]:
    """Return the mean of each value by name."""
    return {name: value / weight for name, (value, weight) in sums.items()}


def read_results(
    unread: Sequence[StepResult], distributed: DistributedRuntime
) -> tuple[list[float], list[Sums], set[str]]:
    """Return the losses and the logged values of steps: one copy from the device, over all ranks. A collective.

    The names of the values that `train_step` logged are returned, too.
    """
    own = {(name, result.step > 0 and name in result.weights) for result in unread for name in result.logged}
    all_names = set[tuple[str, bool]]().union(*distributed.gather(own))
    names = sorted({name for name, _ in all_names})
    cells = [(i, name) for i in range(len(unread)) for name in names]
    losses = torch.stack([result.loss for result in unread])
    losses = losses.to(widest_float(losses.device))
    given = [unread[i].logged.get(name, 0.0) for i, name in cells]
    logged = [torch.as_tensor(value, dtype=losses.dtype, device=losses.device).detach().reshape(1) for value in given]
    values: list[float] = torch.cat([losses, *logged]).tolist()
    # Not every step logs every name, and not on every rank.
    weights = [unread[i].weights.get(name, 1.0) if name in unread[i].logged else 0.0 for i, name in cells]
    sums = distributed.sum([*values, *weights])
    first, last = len(unread), len(values)
    read: list[Sums] = [{} for _ in unread]
    for (i, name), value, weight in zip(cells, sums[first:last], sums[last:], strict=True):
        if weight:
            read[i][name] = value, weight
    mean_losses = [loss / distributed.world_size for loss in sums[:first]]
    return mean_losses, read, {name for name, is_from_step in all_names if is_from_step}

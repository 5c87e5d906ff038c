"""The sums of an evaluation: losses and logged values, over the items of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.tensors.devices import widest_float
from ptacc.types.outputs import StepOutput

LOSS = ""
"""The name of the loss among the logged values."""


class LossSum:
    """A sum of losses on the device, in the widest type of the device, and the number of items."""

    def __init__(self, device: torch.device) -> None:
        self.total: Tensor = torch.zeros((), dtype=widest_float(device), device=device)
        self.items: float = 0.0

    def add(self, mean: Tensor, items: float) -> None:
        """Add a mean over `items` items."""
        self.total.add_(mean, alpha=items)
        self.items += items


class EvalSums:
    """Sums of the losses and of the logged values of an evaluation, on the device of this rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums = {LOSS: LossSum(device)}

    def add(self, output: StepOutput[Any], items: float) -> None:
        """Add the output of a batch."""
        if output.is_sum:
            self._sums[LOSS].total.add_(output.loss)
            self._sums[LOSS].items += items
        elif items:
            self._sums[LOSS].add(output.loss, items)
        for name, value in output.logged.items() if items else ():  # a mean over no items is NaN
            self._sums.setdefault(name, LossSum(self._device)).add(value, items)

    def means(self, distributed: DistributedRuntime) -> dict[str, float]:
        """Return the means over the items of all ranks, by name, and that of the losses as `LOSS`. A collective.

        A value is a mean over the items of the batches that logged it. Without items, there is none.
        """
        totals = torch.stack([values.total for values in self._sums.values()]).tolist()
        own = {name: (total, self._sums[name].items) for name, total in zip(self._sums, totals, strict=True)}
        ranks = distributed.gather(own)
        means: dict[str, float] = {}
        for name in dict.fromkeys(name for rank in ranks for name in rank):
            parts = [rank[name] for rank in ranks if name in rank]
            if items := sum(count for _, count in parts):
                means[name] = sum(total for total, _ in parts) / items
        return means

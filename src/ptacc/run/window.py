"""A window: the batches of one step, whose divisor is known before the first backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic

from torch import Tensor

from ptacc.data.batch import HostBatch
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError, LossError
from ptacc.types.aliases import BatchT
from ptacc.types.outputs import StepOutput


@dataclass(frozen=True, slots=True)
class Window(Generic[BatchT]):
    """The batches that this process takes for one step.

    Args:
        batches: The batches, fewer than asked for at an epoch's end.
        counts: Items of each batch, 0 for phantoms.
        total: Items of the step, over all its batches and all processes.
        replicas: Number of the model's replicas, whose gradients are averaged.
    """

    batches: list[HostBatch[BatchT]]
    counts: list[int]
    total: float
    replicas: int

    def scale_loss(self, index: int, output: StepOutput[Any]) -> Tensor:
        """Scale the loss of one batch so that the gradients, averaged over the replicas, are the step's.

        Raises:
            LossError: A mean over a batch that has no items: it is NaN.
        """
        count = self.counts[index]
        if output.is_sum:
            return divide(output.loss, 0 if self.batches[index].is_padding else self.replicas, self.total)
        if count == 0 and not self.batches[index].is_padding:
            raise LossError(
                "A batch has no items, and a mean over nothing is NaN. Return StepOutput.from_sum(loss_sum, ...) from "
                "train_step, which is right for such a batch too."
            )
        return divide(output.loss, count * self.replicas, self.total)

    def weight(self, index: int) -> float:
        """Return the weight of a mean over one batch in the step's, which is averaged over the replicas."""
        return self.counts[index] * self.replicas / self.total


def divide(value: Tensor, weight: float, total: float) -> Tensor:
    """Return `value * weight / total`, by one division: for even windows that is what a plain loop computes."""
    if weight == total:
        return value
    return value / (total / weight) if weight else value * 0.0


def make_windows(
    batches: Iterator[HostBatch[BatchT]],
    size: int,
    count_items: Callable[[BatchT], int],
    distributed: DistributedRuntime,
    *,
    items_are_samples: bool,
) -> Iterator[Window[BatchT]]:
    """Group batches into windows of `size`, the last one maybe shorter, and count their items.

    Args:
        batches: This process's batches of an epoch.
        size: Batches a window.
        count_items: Returns the items of a batch on the host.
        distributed: The processes. They are asked for their counts, unless those follow from how samples were dealt.
        items_are_samples: Whether a batch's items are its samples, so that the dealing tells the total.
    """
    while window := list(islice(batches, size)):
        counts = [0 if batch.is_padding else count_items(batch.data) for batch in window]
        if distributed.is_single_process:
            total: float = sum(counts)
        elif items_are_samples and all(batch.total is not None for batch in window):
            total = sum(batch.total or 0 for batch in window)
            check_counts(window, counts)
        else:
            (total,) = distributed.sum([sum(counts) if distributed.is_replica_leader else 0])
        if not total:
            raise DataError(
                f"The {len(window)} batches of a step have no items at all: count_items gave 0 for each, on every "
                "process. Leave such batches out of the data."
            )
        yield Window(window, counts, total, distributed.replicas)


def check_counts(window: list[HostBatch[Any]], counts: list[int]) -> None:
    """Raise `DataError` where batches do not hold the samples that were dealt."""
    for batch, count in zip(window, counts, strict=True):
        if count != batch.samples:
            raise DataError(
                f"A batch of {batch.samples} samples holds {count} items. Override count_items to say what the loss "
                "is a mean over."
            )

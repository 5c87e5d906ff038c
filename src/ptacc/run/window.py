"""A window: the batches of one step, with a divisor that is known before the first backward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any, Generic

from torch import Tensor

from ptacc.data.batch import HostBatch
from ptacc.data.wrappers import fill_skipped
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import DataError, LossError
from ptacc.tensors.structures import iterate_tensors
from ptacc.types.aliases import BatchT
from ptacc.types.outputs import StepOutput
from ptacc.validation import value_text


@dataclass(slots=True)
class Window(Generic[BatchT]):
    """The batches that this rank takes for one step.

    Args:
        batches: The batches. The last window of an epoch may have fewer. Empty if all were left out on all ranks.
        counts: Items of each batch, 0 for a padding batch.
        total: Items of the step, over all batches and all ranks.
        replicas: Number of replicas of the model, over which gradients are averaged.
        read: Number of batches that were read for it, including those that were left out.
        is_short: Whether there were fewer than a step takes, so that it is the last one of its epoch.
        end: Offset in the epoch's data after them.
    """

    batches: list[HostBatch[BatchT]]
    counts: list[float]
    total: float
    replicas: int
    read: int
    is_short: bool
    end: int

    def scale_loss(self, index: int, output: StepOutput[Any]) -> Tensor:
        """Return the loss of a batch, scaled so that the gradients averaged over the replicas are those of the step.

        Raises:
            LossError: The loss is a mean over a batch without items, which is NaN.
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
        """Return the weight of a mean over a batch in the mean over the step, before averaging over replicas."""
        return self.counts[index] * self.replicas / self.total


def divide(value: Tensor, weight: float, total: float) -> Tensor:
    """Return `value * weight / total` with one division, and unchanged in a window of one batch as in a plain loop."""
    if weight == total:
        return value
    return value / (total / weight) if weight else value * 0.0


@dataclass(frozen=True, slots=True)
class ItemCounter(Generic[BatchT]):
    """Counts the items of batches.

    Args:
        count_items: Returns the items of a batch, on the host.
        are_samples: Returns whether the items of a batch are its samples.
    """

    count_items: Callable[[BatchT], float]
    are_samples: Callable[[BatchT], bool]

    def count(self, batch: HostBatch[BatchT]) -> float:
        """Return the items of a batch: none in a padding batch, and in one that was left out.

        Raises:
            DataError: The items are the samples, and their numbers differ. A collate function may leave samples out:
                all tensors of such a batch have the same number of items. Or the count is not a finite number, 0 or
                more.
        """
        if batch.data is None or batch.is_padding:
            return 0
        count = self.count_items(batch.data)
        if type(count) not in (int, float) or not 0 <= count < math.inf:
            count = as_count(count)
        if batch.samples != count and batch.samples is not None and self.are_samples(batch.data):
            sizes = {tensor.shape[0] for tensor in iterate_tensors(batch.data) if tensor.dim()}
            if batch.total is not None or sizes != {count}:
                raise DataError(
                    f"A batch of {batch.samples} samples holds {count:g} items: the size of its first tensor, without "
                    "targets that the loss ignores. Override count_items(self, batch) to return what the loss is a "
                    "mean over, such as `len(batch[1])` or `int((batch[1] != -100).sum())`."
                )
        return count


def as_count(count: Any) -> float:
    """Return a count of items, such as a tensor or a number of NumPy, as a number of Python.

    Raises:
        DataError: It is not a finite number, 0 or more.
    """
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        if 0 <= (number := float(count)) < math.inf:
            return number
    raise DataError(
        f"count_items gave {value_text(count)}: it must return a finite number, 0 or more, of what the loss of the "
        "batch is a mean over."
    )


def make_windows(
    batches: Iterator[HostBatch[BatchT]],
    sizes: Iterable[int],
    counter: ItemCounter[BatchT],
    distributed: DistributedRuntime,
) -> Iterator[Window[BatchT]]:
    """Group batches into windows of `sizes`, of which the last may be smaller, and count their items.

    A batch that was left out keeps its place in a window, without items.

    Args:
        batches: The batches of this rank in an epoch.
        sizes: Batches of each window, without an end.
        counter: Counts the items of each batch.
        distributed: The ranks. They sum their counts, unless the total follows from the partition of the samples.
    """
    for size in sizes:
        loaded = list(islice(batches, size))
        if not loaded:
            return
        window, counts, total = count_batches(loaded, counter, distributed)
        read = len(loaded)
        yield Window(window, counts, total, distributed.replicas, read, read < size, loaded[-1].end)


def count_batches(
    window: list[HostBatch[BatchT]], counter: ItemCounter[BatchT], distributed: DistributedRuntime
) -> tuple[list[HostBatch[BatchT]], list[float], float]:
    """Return the batches to run, the items of each, and the items of all ranks. No batches if all were left out."""
    counts = list(map(counter.count, window))
    total = sum(counts)
    if not distributed.is_single_process:
        window, total = sum_counts(window, total, counter, distributed)
    elif not all(counts):
        is_given = [batch.data is not None for batch in window]
        window, counts = list(compress(window, is_given)), list(compress(counts, is_given))
    if not total and window:
        raise DataError(
            f"The {len(window)} batches of a step have no items at all: count_items gave 0 for each, on every process. "
            "Leave such batches out of the data: return None from collate_fn."
        )
    return window, counts, total


def sum_counts(
    window: list[HostBatch[BatchT]], items: float, counter: ItemCounter[BatchT], distributed: DistributedRuntime
) -> tuple[list[HostBatch[BatchT]], float]:
    """Return the batches to run, and the items of all ranks, of which this rank has `items`.

    A collective, unless the number of items is that of the samples, which is known.
    """
    if all(batch.total is not None for batch in window) and counter.are_samples(window[0].data):
        return window, sum(batch.total or 0 for batch in window)
    skipped: float = sum(batch.data is None for batch in window)
    is_counted = distributed.is_replica_leader
    total, skipped = distributed.sum([items, skipped] if is_counted else [0, 0])
    return fill_skipped(window, distributed) if skipped else window, total

"""Batches of samples with similar lengths, which need little padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler
from typing_extensions import override

from ptacc.errors import DataError
from ptacc.validation import check_at_least


class LengthGrouped(Sampler[int]):
    """Shuffles samples so that those of a batch have similar lengths.

    In each epoch, the samples are shuffled and divided into groups of `batches_per_group` batches. Each group is sorted
    by length and cut into batches, and the batches of all groups are shuffled. Of the full batches, the one with the
    longest sample comes first, so that a run that needs too much memory fails at its first step. A smaller batch comes
    last.

    It draws from torch's global generator, which a trainer seeds for each epoch: a run with a seed has the same order
    again, also when it is resumed, and on any number of processes.

    Args:
        lengths: The length of each sample, such as its number of tokens: a sequence or a tensor `(samples,)`.
        batch_size: Samples that are padded together: `per_device_batch_size`. On several processes, all of them have
            batches of similar lengths in a step if it is multiplied by their number.
        batches_per_group: Batches whose samples are sorted together. More of them need less padding, and leave less of
            the order to chance.

    Raises:
        DataError: There are no lengths, or they are not integers of at least 0.

    Example:
        >>> from ptacc.samplers import LengthGrouped
        >>> lengths = [3, 9, 1, 8, 2, 7]
        >>> order = [*LengthGrouped(lengths, batch_size=2)]
        >>> [lengths[index] for index in order[:2]], sorted(order)
        ([9, 8], [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, lengths: Sequence[int] | Tensor, batch_size: int, *, batches_per_group: int = 50) -> None:
        check_at_least("LengthGrouped", "batch_size", batch_size, 1)
        check_at_least("LengthGrouped", "batches_per_group", batches_per_group, 1)
        self._lengths = torch.as_tensor(lengths, device="cpu")
        is_integral = not (self._lengths.is_floating_point() or self._lengths.is_complex())
        if self._lengths.dim() != 1 or not len(self._lengths) or not is_integral or int(self._lengths.min()) < 0:
            raise DataError("LengthGrouped(lengths=...): must be the length of each sample, integers of at least 0.")
        self._batch_size, self._group_size = batch_size, batch_size * batches_per_group

    def __len__(self) -> int:
        return len(self._lengths)

    @override
    def __iter__(self) -> Iterator[int]:
        shuffled, size = torch.randperm(len(self), device="cpu"), self._group_size
        groups = [shuffled[start : start + size] for start in range(0, len(self), size)]
        order = torch.cat([group[self._lengths[group].argsort(descending=True, stable=True)] for group in groups])
        num_batches = len(self) // self._batch_size
        end = num_batches * self._batch_size
        batches = order[:end].view(num_batches, self._batch_size)[torch.randperm(num_batches, device="cpu")]
        if num_batches:
            longest = int(self._lengths[batches].amax(dim=1).argmax())
            batches = batches.roll(-longest, dims=0)
        return iter([*batches.flatten().tolist(), *order[end:].tolist()])

"""Batch norm over the global batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import DataError, ModelError
from ptacc.model.patching import Forward, patched_forwards
from ptacc.run.run import Run


class SyncBatchNormMixin(Mixin):
    """Normalises by the statistics of the global batch: all that the processes take at the same time.

    Without it, batch norm in training sees the batch of its own process alone, and so trains otherwise on each number
    of processes. With it, losses, gradients and running statistics are those of one process with the whole batch.
    Processes may have unequal batches, on any device; what only keeps a process in step with the others counts nowhere.

    Options:
        sync_batch_norm: Whether to do so. With one process there is nothing to do.

    Hooks: `around_run`.

    Combines with: everything. Each batch of an accumulated step has statistics of its own. Evaluations are not
    concerned.

    Source: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167

    Example:
        >>> from ptacc import SyncBatchNormMixin, Trainer
        >>> class MyTrainer(SyncBatchNormMixin, Trainer):
        ...     pass
    """

    sync_batch_norm: bool = True

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Patch the batch norms of the model."""
        run = self.run
        is_needed = self.sync_batch_norm and not self._distributed.is_single_process
        norms = find_batch_norms(self.unwrapped_model, type(self).__name__) if is_needed else []
        # Before the other mixins patch: what they put around a norm stays around this one's.
        patched = patched_forwards(norms, lambda norm, local: forward_over_processes(norm, local, run))
        with patched, super().around_run():
            yield


def find_batch_norms(model: nn.Module, owner: str) -> list[_BatchNorm]:
    """Return the batch norms of a model.

    Raises:
        ModelError: One of them does not compute what torch's own do.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            raise ModelError(
                f"{owner}: {name or 'the model'} is a {type(norm).__name__}, a batch norm with a forward of its own, "
                "which cannot be made to see the batches of other processes. Use one of torch's batch norms, or "
                "normalise by the batch of each process: sync_batch_norm=False."
            )
    return list(norms.values())


def forward_over_processes(norm: _BatchNorm, local: Forward, run: Run) -> Forward:
    """Return a forward for `norm` that sees the global batch where all processes train, and is `local` elsewhere."""

    def forward(input: Tensor) -> Tensor:  # noqa: A002  # torch's name, by which it may be called
        if run.batch is not None and norm.training:
            norm._check_input_dim(input)  # type: ignore[no-untyped-call]  # noqa: SLF001  # as torch's forward does
            return normalise(input, norm, is_padding=run.batch.is_padding, copies=run.distributed.replica_size)
        return cast(Tensor, local(input))

    return forward


# ---- the mathematics


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is the sum of their gradients.

    Scaled losses are averaged over the processes by way of their gradients, so that this gives the gradient of the mean
    loss. torch has a function for it, which is deprecated.
    """

    @staticmethod
    @override
    def forward(ctx: object, value: Tensor) -> Tensor:
        """Sum."""
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @override
    def backward(ctx: object, *gradients: Tensor) -> Any:
        """Sum the gradients."""
        return sum_over_processes(*gradients)


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, with its graph. A collective, and so is its backward pass."""
    return cast(Tensor, SumOverProcesses.apply(value))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """The statistics of a global batch.

    Args:
        count: scalar, values of each channel
        mean: (channels,)
        variance: (channels,), biased
    """

    count: Tensor
    mean: Tensor
    variance: Tensor


def normalise(inputs: Tensor, norm: _BatchNorm, *, is_padding: bool = False, copies: int = 1) -> Tensor:
    """Normalise inputs by the statistics of the global batch, and have `norm` track these.

    Args:
        inputs: `(items, channels, ...)`, this process's part of the batch. Half precision is computed in float32.
        norm: The norm, for its weights, its options and its running statistics.
        is_padding: Whether the inputs count nowhere, and only keep this process in step.
        copies: Number of processes that have the same inputs, since they share a replica of the model.

    Returns:
        The normalised inputs, in their shape and dtype.

    Raises:
        DataError: The global batch has one value for each channel only.
    """
    values = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    others = [0, *range(2, inputs.dim())]
    along_channels = [1, -1, *(1 for _ in others[1:])]
    # A phantom goes through the same operations: its process has to take part in every sum of the backward pass.
    weight = 0.0 if is_padding else 1.0
    own_count = 0 if is_padding else inputs.numel() // inputs.shape[1]

    own_sum = values.sum(others) * weight
    totals = sum_over_processes(torch.cat([own_sum, own_sum.new_full((1,), own_count)])) / copies
    count = totals[-1].detach()
    if own_count < 2:  # else there is no need to ask the device
        check_count(int(count), inputs)
    mean = totals[:-1] / count
    centred = values - mean.view(along_channels)
    variance = sum_over_processes(centred.square().sum(others) * weight) / copies / count
    track(norm, BatchStatistics(count, mean, variance))

    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    normalised = centred * scale.view(along_channels)
    if norm.bias is not None:
        normalised = normalised + norm.bias.view(along_channels)
    return normalised.to(inputs.dtype)


@torch.no_grad()
def track(norm: _BatchNorm, batch: BatchStatistics) -> None:
    """Move the running statistics of `norm` as torch does: by its momentum, or to the mean of all batches without."""
    if not norm.track_running_stats:
        return
    weight: float | Tensor = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            weight = 1 / norm.num_batches_tracked.to(batch.mean.dtype)
    unbiased = batch.variance * (batch.count / (batch.count - 1))
    for running, value in ((norm.running_mean, batch.mean), (norm.running_var, unbiased)):
        if running is not None:
            running.copy_(weight * value + (1 - weight) * running)


def check_count(count: int, inputs: Tensor) -> None:
    """Raise `DataError` where there is nothing to take a variance of."""
    if count < 2:
        raise DataError(
            f"Expected more than 1 value per channel when training, got {count} over all processes, in inputs of the "
            f"shape {tuple(inputs.shape)}: batch norm has no variance of them. Give larger batches, or drop the last "
            'one: train_dataloader_kwargs={"drop_last": True}.'
        )

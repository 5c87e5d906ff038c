"""Batch norm over the batches of all ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from ptacc.errors import DataError, ModelError


def find_batch_norms(model: nn.Module, owner: str) -> list[_BatchNorm]:
    """Return the batch norm layers of a model.

    Raises:
        ModelError: A layer overrides the forward of torch's classes.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    for name, norm in norms.items():
        if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and not has_activation(norm):
            raise ModelError(
                f"{owner}: {name or 'the model'} is a {type(norm).__name__}, a batch norm with a forward of its own, "
                "which cannot be synchronised across ranks. Use one of torch's batch norms, or normalise by the batch "
                "of each rank: sync_batch_norm=False."
            )
    return list(norms.values())


def has_activation(norm: _BatchNorm) -> bool:
    """Return whether a layer is timm's `BatchNormAct2d`, which applies its modules `drop` and `act` after the norm."""
    return type(norm).__name__ == "BatchNormAct2d" and type(norm).__module__.startswith("timm.")


class AllReduceSum(torch.autograd.Function):
    """All-reduces a tensor with a sum, and its gradient as well.

    The engine averages the gradients of the ranks' losses, so the result is the gradient of the mean loss. torch's own
    differentiable all-reduce is deprecated.
    """

    @staticmethod
    @override
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @override
    def backward(ctx: object, *gradients: Tensor) -> Any:
        return all_reduce_sum(*gradients)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks. Differentiable; a collective, and so is the backward pass."""
    return cast(Tensor, AllReduceSum.apply(value))  # type: ignore[no-untyped-call]


def global_batch_norm(inputs: Tensor, norm: _BatchNorm, *, is_padding: bool = False, replica_size: int = 1) -> Tensor:
    """Normalise inputs by the statistics of the global batch, and update the running statistics. A collective.

    Args:
        inputs: `(items, channels, ...)`, this rank's batch. Half precision is computed in float32.
        norm: The layer, with its weights, options and running statistics.
        is_padding: Whether the inputs are a padding batch, and excluded from the statistics.
        replica_size: Number of ranks that share a replica of the model, and therefore have the same inputs.

    Returns:
        The normalised inputs, in their shape and dtype. For a layer with an activation, what that returns for them.

    Raises:
        DataError: The global batch has a single value per channel.
    """
    values = inputs.float() if inputs.dtype in (torch.float16, torch.bfloat16) else inputs
    reduced_dims = [0, *range(2, inputs.dim())]
    channel_shape = [1, -1, *(1 for _ in reduced_dims[1:])]
    # A padding batch runs the same operations, since its rank takes part in every all-reduce of the backward pass.
    weight = 0.0 if is_padding else 1.0
    own_count = 0 if is_padding else inputs.numel() // inputs.shape[1]

    own_sum = values.sum(reduced_dims) * weight
    totals = all_reduce_sum(torch.cat([own_sum, own_sum.new_full((1,), own_count)])) / replica_size
    count = totals[-1].detach()
    if own_count < 2:  # otherwise the count is enough, and reading it would wait for the device
        check_count(int(count), inputs)
    mean = totals[:-1] / count
    centred = values - mean.view(channel_shape)
    variance = all_reduce_sum(centred.square().sum(reduced_dims) * weight) / replica_size / count
    update_running_statistics(norm, count, mean, variance)

    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    normalised = centred * scale.view(channel_shape)
    if norm.bias is not None:
        normalised = normalised + norm.bias.view(channel_shape)
    outputs = normalised.to(inputs.dtype)
    return cast(Any, norm).act(cast(Any, norm).drop(outputs)) if has_activation(norm) else outputs


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, count: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics as torch does: by momentum, or as the mean of all batches without momentum.

    Args:
        norm: The layer.
        count: scalar, number of values per channel
        mean: (channels,)
        variance: (channels,), biased
    """
    if not norm.track_running_stats:
        return
    weight: float | Tensor = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            weight = 1 / norm.num_batches_tracked.to(mean.dtype)
    unbiased = variance * (count / (count - 1))
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            running.copy_(weight * value + (1 - weight) * running)


def check_count(count: int, inputs: Tensor) -> None:
    """Raise `DataError` if the global batch has too few values for a variance."""
    if count < 2:
        raise DataError(
            f"Expected more than 1 value per channel when training, got {count} over all ranks, in inputs of the "
            f"shape {tuple(inputs.shape)}. Batch norm cannot compute their variance. Use larger batches, or drop the "
            'last one: train_dataloader_kwargs={"drop_last": True}.'
        )

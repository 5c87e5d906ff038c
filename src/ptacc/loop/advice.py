"""Advice: what would make a trainer faster, told by `explain()` and left to its user to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from ptacc.engines.base import OptimizerSlot

FUSED_ON: Mapping[type[Optimizer], tuple[str, ...]] = {
    SGD: ("cpu", "cuda"),
    Adam: ("cpu", "cuda"),
    AdamW: ("cpu", "cuda"),
    Adagrad: ("cpu",),
}
"""The devices on which an optimizer has a fused kernel in every version of torch that is supported."""
AMPERE = (8, 0)
"""The compute capability from which on a GPU multiplies matrices in TF32."""


class Advice(NamedTuple):
    """One piece of advice.

    Args:
        write: What to write.
        reason: What comes of it.
    """

    write: str
    reason: str


def advice_on(
    model: nn.Module, slots: Collection[OptimizerSlot], device: torch.device, *, precision: str, is_sharded: bool
) -> tuple[Advice, ...]:
    """Return all advice.

    Args:
        model: The bare model.
        slots: The optimizers.
        device: Where it will be trained.
        precision: Of the forward pass.
        is_sharded: Whether weights, or what optimizers keep, are dealt out over the processes.
    """
    is_plain = not is_sharded and not has_sparse_gradients(model)
    on_optimizers = (
        advice for slot in slots if is_plain for advice in advice_on_optimizer(slot.optimizer, device, precision)
    )
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    on_matrices = advice_on_matrices({p.dtype for p in model.parameters()}, precision, capability)
    return (*on_optimizers, *on_matrices)


def advice_on_optimizer(optimizer: Optimizer, device: torch.device, precision: str = "no") -> Iterator[Advice]:
    """Advise the fused kernel of torch's optimizers, unless the user has chosen one, or it takes no less time.

    Args:
        optimizer: The optimizer of a model whose gradients are dense.
        device: Where it will step.
        precision: Of the forward pass.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> [advice.write for advice in advice_on_optimizer(Adam(net.parameters()), torch.device("cpu"))]
        ['Adam(..., fused=True)']
        >>> list(advice_on_optimizer(Adam(net.parameters(), fused=True), torch.device("cpu")))
        []
    """
    groups = optimizer.param_groups
    kind = type(optimizer)  # not a subclass, which may step in its own way
    has_fused = device.type in FUSED_ON.get(kind, ())
    is_chosen = any(group[name] for group in groups for name in ("foreach", "differentiable") if name in group)
    is_open = has_fused and not is_chosen and all(group.get("fused") is None for group in groups)
    # SGD has so little to do for a weight without momentum that one kernel does it no faster than another. With it, and
    # where a gradient scaler skips the first step, torch's kernel goes on from momenta that nobody has set.
    is_worth_it = kind is not SGD or (precision != "fp16" and any(group["momentum"] for group in groups))
    are_floating = all(parameter.is_floating_point() for group in groups for parameter in group["params"])
    if is_open and is_worth_it and are_floating:
        reason = "one kernel updates all weights, in place of several for each; the same but for rounding"
        yield Advice(f"{kind.__name__}(..., fused=True)", reason)


def has_sparse_gradients(model: nn.Module) -> bool:
    """Say whether a model has embeddings whose gradients are sparse, which fused kernels refuse."""
    return any(isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse for part in model.modules())


def advice_on_matrices(
    dtypes: Collection[torch.dtype], precision: str, capability: tuple[int, int] | None
) -> Iterator[Advice]:
    """Advise TF32 where a GPU has it, and float32 is what it computes in.

    Args:
        dtypes: Of the parameters.
        precision: Of the forward pass.
        capability: The GPU's compute capability, None for any other device.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices

    Example:
        >>> [advice.write for advice in advice_on_matrices({torch.float32}, "no", (9, 0))]
        ['torch.set_float32_matmul_precision("high")']
    """
    has_tf32 = capability is not None and capability >= AMPERE
    if has_tf32 and precision == "no" and torch.float32 in dtypes and torch.get_float32_matmul_precision() == "highest":
        reason = "float32 matrices are multiplied on tensor cores, by 10 bits of their 23: not the same numbers"
        yield Advice('torch.set_float32_matmul_precision("high")', reason)

"""An estimate of the memory that weights, gradients and optimizer state need, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adadelta, Adam, Adamax, AdamW, Muon, NAdam, Optimizer, RAdam, RMSprop, Rprop

from ptacc.display.numbers import format_bytes
from ptacc.tensors.structures import has_shape, iterate_tensors

STATE_TENSORS: Mapping[type[Optimizer], tuple[int, tuple[str, ...]]] = {
    SGD: (0, ("momentum",)),
    Adam: (2, ("amsgrad",)),
    AdamW: (2, ("amsgrad",)),
    NAdam: (2, ()),
    RAdam: (2, ()),
    Adamax: (2, ()),
    Adadelta: (2, ()),
    RMSprop: (1, ("momentum", "centered")),
    Rprop: (2, ()),
    ASGD: (1, ()),
    Muon: (1, ()),
}
"""How many tensors like a parameter an optimizer keeps for it: always, and one more for each of these settings."""


class ShardCounts(NamedTuple):
    """The numbers of ranks over which a tensor of each kind is sharded.

    `layers` is the number over which tensor parallelism splits some layers; it is not known how much of the model.
    """

    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    layers: int = 1


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of full tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if has_shape(tensor))


def count_state_bytes(optimizer: Optimizer) -> int | None:
    """Return the bytes of an optimizer's state, or of its state after the first step; None if they are unknown."""
    if optimizer.state:
        return count_bytes(iterate_tensors(list(optimizer.state.values())))
    if type(optimizer) not in STATE_TENSORS:  # subclasses may have a state of their own
        return None
    always, settings = STATE_TENSORS[type(optimizer)]
    return sum(
        (always + sum(bool(group[name]) for name in settings))
        * count_bytes(parameter for parameter in group["params"] if parameter.requires_grad)
        for group in optimizer.param_groups
    )


def autocast_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the float32 weights that autocast copies in lower precision: matrices and kernels, without embeddings."""
    parts = [part for part in model.modules() if not isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    own = {parameter for part in parts for parameter in part.parameters(recurse=False) if has_shape(parameter)}
    return (parameter for parameter in own if parameter.dtype == torch.float32 and parameter.dim() > 1)


def memory_rows(
    model: nn.Module, optimizers: Mapping[str, Optimizer], precision: str, shards: ShardCounts
) -> tuple[tuple[str, str, str], ...]:
    """Return rows of what needs memory on a rank, of its size, and of what it consists of; the last has the total.

    Activations and temporary tensors are not included. The model is joined with the modules that are trained with it,
    and the precision is that of the forward pass.
    """
    weights, buffers = list(model.parameters()), list(model.buffers())
    trainable = [parameter for parameter in weights if parameter.requires_grad]
    sizes: list[tuple[str, float | None, str]] = [
        ("weights", count_bytes(weights) / shards.weights, describe(weights, "parameters", shards.weights)),
        ("buffers", count_bytes(buffers), describe(buffers, "values", 1)),
        ("gradients", count_bytes(trainable) / shards.gradients, describe(trainable, "values", shards.gradients)),
    ]
    for name, optimizer in optimizers.items():
        size = count_state_bytes(optimizer)
        when = "as it is now" if optimizer.state else "after the first step"
        detail = f"state of {type(optimizer).__name__} {when}{over_ranks(shards.optimizer)}"
        sizes.append((name, None if size is None else size / shards.optimizer, detail))
    if precision != "no":
        detail = f"{precision} copies of weights, at most: autocast keeps them until the backward pass"
        sizes.append(("autocast", count_bytes(autocast_weights(model)) / 2, detail))
    known = [size for _, size, _ in sizes if size is not None]
    limits = "at least, " * (len(known) < len(sizes))
    limits += f"less where tensor parallelism splits layers over {shards.layers} ranks, " * (shards.layers > 1)
    rows = (
        (what, "unknown" if size is None else format_bytes(size), detail)
        for what, size, detail in sizes
        if size != 0 or what in optimizers
    )
    return (*rows, ("total", format_bytes(sum(known)), f"{limits}without activations, which depend on the batch size"))


def describe(tensors: Iterable[Tensor], kind: str, shards: int) -> str:
    """Return the number and the dtypes of the values of tensors."""
    known = [tensor for tensor in tensors if has_shape(tensor)]
    dtypes = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in known}))
    return f"{sum(tensor.numel() for tensor in known):,} {kind} in {dtypes}{over_ranks(shards)}"


def over_ranks(shards: int) -> str:
    """Return ", sharded over ... ranks" if there are several."""
    return f", sharded over {shards} ranks" if shards > 1 else ""

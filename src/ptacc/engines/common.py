"""What engines share: equal buffers on all ranks, and what was changed in models and optimizers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks, in one broadcast for each dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, src=0)
        for buffer, part in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def remove_hooks(module: nn.Module, packages: tuple[str, ...]) -> None:
    """Remove the hooks of a module whose functions were defined in the given packages."""
    tables = [table for name, table in vars(module).items() if isinstance(table, dict) and "_hooks" in name]
    keys = [
        key
        for table in tables
        for key, hook in table.items()
        if (getattr(hook, "__module__", None) or "").startswith(packages)
    ]
    for table in tables:  # torch lists hooks with keyword arguments, and hooks that are always called, in two tables
        for key in keys:
            table.pop(key, None)


class AddedAttributes:
    """The attributes that a library adds to modules and parameters, so that they can be removed again."""

    def __init__(self, objects: Iterable[object]) -> None:
        """Record which attributes `objects` have before the library gets them."""
        self._original = {owner: frozenset(vars(owner)) for owner in objects}
        self._added: dict[object, frozenset[str]] = {}

    def record(self) -> None:
        """Take the attributes added so far as the library's. Those added later are the user's."""
        self._added = {owner: frozenset(vars(owner)) - names for owner, names in self._original.items()}

    def remove(self, owner: object, prefixes: tuple[str, ...] = ()) -> None:
        """Remove the library's attributes from an object, and later ones that start with a prefix."""
        names = vars(owner)
        lazy = {name for name in names if name.startswith(prefixes)} - self._original[owner]
        for name in self._added.get(owner, frozenset()) | lazy:
            names.pop(name, None)


def has_own_zero_grad(optimizer: Optimizer) -> bool:
    """Return whether an optimizer, or its class, has a `zero_grad` other than torch's."""
    return getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad

"""What engines share: equal buffers on all ranks, and the restoration of a model that a library has changed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ptacc.engines.base import Closure


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


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Copy rank 0's tensors to all ranks."""
    for tensor in tensors:
        value = tensor.detach().to(device).contiguous()
        dist.broadcast(value, src=0)
        tensor.copy_(value)


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


class OriginalModel:
    """A user's model as it was before a library changed it, to undo all that the library changed besides the weights.

    Args:
        model: The model, not changed yet.
        packages: Those whose hooks are removed again.
        prefixes: Of the attributes that the library adds as late as in the first forward pass.
    """

    def __init__(self, model: nn.Module, packages: tuple[str, ...], prefixes: tuple[str, ...] = ()) -> None:
        self._model, self._packages, self._prefixes = model, packages, prefixes
        self.devices: dict[nn.Parameter, torch.device] = {p: p.device for p in model.parameters()}
        self._buffer_devices = {name: buffer.device for name, buffer in model.named_buffers()}
        self._attributes = {owner: frozenset(vars(owner)) for owner in (*model.modules(), *self.devices)}
        self._added = dict.fromkeys(self._attributes, frozenset[str]())

    def record_added_attributes(self) -> None:
        """Take the attributes added so far as the library's. Later ones are the user's, save for the prefixes."""
        self._added = {owner: frozenset(vars(owner)) - names for owner, names in self._attributes.items()}

    def restore(self) -> None:
        """Remove attributes and hooks of the library, and move buffers back to their devices."""
        for owner, names in self._attributes.items():
            late = {name for name in vars(owner) if name.startswith(self._prefixes)} - names
            for name in self._added[owner] | late:
                vars(owner).pop(name, None)
        for module in self._model.modules():
            remove_hooks(module, self._packages)
        for name, buffer in self._model.named_buffers():
            buffer.data = buffer.data.to(self._buffer_devices[name])


def has_own_zero_grad(optimizer: Optimizer) -> bool:
    """Return whether an optimizer, or its class, has a `zero_grad` other than torch's."""
    return getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad


def averaged(closure: Closure) -> Closure:
    """Return a closure whose loss is the mean over the ranks, equal on all of them: line searches branch on it."""

    def call() -> Tensor:
        loss = closure().clone()
        dist.all_reduce(loss)
        return loss / dist.get_world_size()

    return call

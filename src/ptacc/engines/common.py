"""The buffers of models that each process has whole: kept equal, as DDP keeps them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes rank 0's buffers: those of each dtype in one message."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        dist.broadcast(flat, src=0)
        parts = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def remove_hooks(module: nn.Module, packages: tuple[str, ...]) -> None:
    """Take the hooks off a module that are functions of some packages."""
    tables = [table for name, table in vars(module).items() if isinstance(table, dict) and "_hooks" in name]
    theirs = [key for table in tables for key, hook in table.items() if is_from_package(packages, hook)]
    for table in tables:  # a hook that takes keywords, or is always called, stands in a second table
        for key in theirs:
            table.pop(key, None)


def is_from_package(packages: tuple[str, ...], hook: object) -> bool:
    """Say whether a hook comes from one of some packages."""
    return callable(hook) and (getattr(hook, "__module__", None) or "").startswith(packages)

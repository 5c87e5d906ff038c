"""The running statistics of norm layers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from typing_extensions import override


class CopiedStatistics(AbstractContextManager[None]):
    """Makes norm layers update copies of their running statistics within the block. Reentrant.

    Restoring the values in place instead would be an in-place change of tensors that a graph may have saved.
    """

    def __init__(self, norms: Sequence[_NormBase]) -> None:
        self._norms = norms
        self._saved: list[list[dict[str, Tensor]]] = []

    @override
    def __enter__(self) -> None:
        self._saved.append([dict(norm.named_buffers(recurse=False)) for norm in self._norms])
        for norm, buffers in zip(self._norms, self._saved[-1], strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())

    @override
    def __exit__(self, *_: object) -> None:
        for norm, buffers in zip(self._norms, self._saved.pop(), strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def find_tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch norm layers that track running statistics. Layers in eval mode keep theirs."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in norms if norm.training and norm.running_mean is not None]


@contextlib.contextmanager
def cumulative_statistics(norms: list[_BatchNorm]) -> Generator[None]:
    """Reset the running statistics, and average all batches of the block with equal weight."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

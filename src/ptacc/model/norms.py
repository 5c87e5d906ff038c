"""The running statistics of norm layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
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

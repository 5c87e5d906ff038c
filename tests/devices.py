"""Devices that this machine lacks, as far as the CPU can stand for them."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class MPSTensor(Tensor):
    """A tensor on the CPU that says it is on MPS, which has no float64. Make one by `tensor.as_subclass(MPSTensor)`."""

    device = torch.device("mps")

    @override
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        if isinstance(result, MPSTensor) and result.dtype == torch.float64:
            raise TypeError("MPS has no float64")
        return result


class PendingEvent:
    """An event of a device, which has not happened while it is in `pending`."""

    def __init__(self, pending: list[object]) -> None:
        self.pending = pending

    def record(self) -> None:
        self.pending.append(self)

    def query(self) -> bool:
        return self not in self.pending

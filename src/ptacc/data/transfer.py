"""Transfer: how batches come to the device, on a GPU beside the computation.

```
host        | 1 | 2 | 3 | 4 |                    loads, and gives orders: it is ahead of the GPU, and waits for nothing
copying         | 1 |    | 2 |      | 3 |
computing           |    1    |    2    |    3   |
```

A batch is copied while the one before it is computed, into memory that was set aside before that began: the stream that
computes owns it, as any other tensor's, and one more batch is all that it takes.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.tensors.structures import to_device
from ptacc.types.aliases import BatchT

Event: TypeAlias = torch.cuda.Event | torch.Event

LEAST_BYTES = 1 << 20
"""Of a tensor that is copied beside the computation. Less takes about the time in which two streams are ordered."""


def transfer_to(device: torch.device) -> Transfer:
    """Return how the batches of one loop come to a device."""
    if device.type == "cpu":
        return Transfer()
    return StreamedTransfer(device) if device.type == "cuda" else PlainTransfer(device)


class Transfer:
    """Leaves batches where they are: on the host, which is the device."""

    def bring(self, batch: BatchT) -> BatchT:
        """Return a batch on the device."""
        return batch


class PlainTransfer(Transfer):
    """Copies each batch to where it is computed on."""

    def __init__(self, device: torch.device) -> None:
        """Bring batches to `device`."""
        self._device = device

    @override
    def bring(self, batch: BatchT) -> BatchT:
        """Return a batch on the device."""
        return to_device(batch, self._device)


class StreamedTransfer(PlainTransfer):
    """Copies large tensors from pinned memory on a stream of its own."""

    def __init__(self, device: torch.device, least_bytes: int = LEAST_BYTES) -> None:
        """Bring batches to `device`, and tensors of at least `least_bytes` by a stream of their own."""
        super().__init__(device)
        self._least_bytes = least_bytes
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._rooms: list[Tensor] = []
        self._set_aside: Event | None = None

    @override
    def bring(self, batch: BatchT) -> BatchT:
        """Return a batch on the device, and set memory aside for one like it."""
        rooms, computing = iter(self._rooms), torch.cuda.current_stream(self._device)
        brought: list[Tensor] = []

        def move(tensor: Tensor) -> Tensor:
            if not self._is_worth_it(tensor):
                return tensor.to(self._device, non_blocking=True)
            room = next(rooms, None)
            if room is None or not are_alike(room, tensor):
                brought.append(tensor.to(self._device, non_blocking=True))
            else:
                self._copy(tensor, room, computing)
                brought.append(room)
            return brought[-1]

        moved = to_device(batch, self._device, move)
        self._rooms = [torch.empty_like(tensor) for tensor in brought]
        if self._rooms:
            # What computes at present may have had this memory before. It is free once this event is reached.
            self._set_aside = computing.record_event()
        return moved

    def _is_worth_it(self, tensor: Tensor) -> bool:
        is_plain = tensor.is_cpu and tensor.layout is torch.strided
        return is_plain and tensor.nbytes >= self._least_bytes and tensor.is_pinned()

    def _copy(self, tensor: Tensor, room: Tensor, computing: torch.cuda.Stream) -> None:
        assert self._set_aside is not None
        self._copying.wait_event(self._set_aside)
        with torch.cuda.stream(self._copying):
            room.copy_(tensor, non_blocking=True)
        computing.wait_stream(self._copying)


def are_alike(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors take the same memory, in the same order."""
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()

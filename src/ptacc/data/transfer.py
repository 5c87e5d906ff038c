"""Copying batches to the device. On a GPU, large tensors are copied while the previous batch is computed.

```
host         | 1 | 2 | 3 | 4 |                    loads and enqueues, ahead of the GPU, without waiting for it
copy stream      | 1 |    | 2 |      | 3 |
compute stream       |    1    |    2    |    3   |
```

The buffer for the next batch is allocated on the compute stream before the current batch is computed, so that it
belongs to that stream as any other tensor does. This takes the memory of one additional batch.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.tensors.structures import to_device
from ptacc.types.aliases import BatchT

Event: TypeAlias = torch.cuda.Event | torch.Event

MIN_STREAMED_BYTES = 1 << 20
"""Smallest tensor copied on the copy stream. Copying less takes about as long as synchronizing two streams."""


def make_transfer(device: torch.device) -> Transfer:
    """Return what copies the batches of one loop to `device`."""
    return StreamedTransfer(device) if device.type == "cuda" else Transfer(device)


class Transfer:
    """Copies each batch to `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def to_device(self, batch: BatchT) -> BatchT:
        """Return the batch on the device. On the CPU it is the same object."""
        return batch if self._device.type == "cpu" else to_device(batch, self._device)


class StreamedTransfer(Transfer):
    """Copies pinned tensors of at least `min_bytes` on a separate CUDA stream."""

    def __init__(self, device: torch.device, min_bytes: int = MIN_STREAMED_BYTES) -> None:
        super().__init__(device)
        self._min_bytes = min_bytes
        self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._buffers: list[Tensor] = []
        self._buffers_are_free: Event | None = None

    @override
    def to_device(self, batch: BatchT) -> BatchT:
        """Return the batch on the device, and allocate buffers for the next one."""
        buffers, compute_stream = iter(self._buffers), torch.cuda.current_stream(self._device)
        large: list[Tensor] = []

        def move(tensor: Tensor) -> Tensor:
            if not self._is_large(tensor):
                return tensor.to(self._device, non_blocking=True)
            buffer = next(buffers, None)
            if buffer is None or not have_same_layout(buffer, tensor):
                large.append(tensor.to(self._device, non_blocking=True))
            else:
                self._copy(tensor, buffer, compute_stream)
                large.append(buffer)
            return large[-1]

        moved = to_device(batch, self._device, move)
        self._buffers = [torch.empty_like(tensor) for tensor in large]
        if self._buffers:
            # The memory may be in use by work that is enqueued on the compute stream. It is free after this event.
            self._buffers_are_free = compute_stream.record_event()
        return moved

    def _is_large(self, tensor: Tensor) -> bool:
        is_plain = tensor.is_cpu and tensor.layout is torch.strided
        return is_plain and tensor.nbytes >= self._min_bytes and tensor.is_pinned()

    def _copy(self, tensor: Tensor, buffer: Tensor, compute_stream: torch.cuda.Stream) -> None:
        assert self._buffers_are_free is not None
        self._copy_stream.wait_event(self._buffers_are_free)
        with torch.cuda.stream(self._copy_stream):
            buffer.copy_(tensor, non_blocking=True)
        compute_stream.wait_stream(self._copy_stream)


def have_same_layout(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and strides."""
    return one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()

"""The engine of several ranks, each of which has a replica of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from ptacc.engines.base import Closure, OptimizerSlot, all_parameters
from ptacc.engines.common import averaged, broadcast_buffers, broadcast_tensors
from ptacc.engines.default import TorchEngine
from ptacc.engines.reducer import GradientReducer
from ptacc.types.protocols import AcceleratorProtocol


class ReplicaEngine(TorchEngine):
    """Averages the gradients over the ranks. The model is the user's own, and is not wrapped.

    Weights and buffers are rank 0's at the start, as are parameters that an optimizer gets later. Buffers are rank 0's
    after each update, too.
    """

    def __init__(
        self,
        accelerator: AcceleratorProtocol,
        model: nn.Module,
        slots: Sequence[OptimizerSlot],
        *,
        is_synchronized: bool = False,
    ) -> None:
        """Make the replicas equal. A collective. If `is_synchronized`, modules communicate in the backward pass."""
        super().__init__(accelerator, model, slots)
        broadcast_tensors((*self._trained.parameters(), *self._trained.buffers()), accelerator.device)
        self._reducers: dict[tuple[OptimizerSlot, ...], GradientReducer] = {}
        self._overlaps = not is_synchronized and not any(
            isinstance(m, nn.SyncBatchNorm) for m in self._trained.modules()
        )
        self._shared, self._group_sizes = {*self._trained.parameters()}, list[int]()
        self._is_last = True

    @property
    def _reducer(self) -> GradientReducer:
        """The reducer of the optimizers that the present update steps."""
        if self._active not in self._reducers:
            self._reducers[self._active] = GradientReducer(
                partial(all_parameters, self._active), self._trained, overlaps=self._overlaps
            )
        return self._reducers[self._active]

    @override
    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        self._is_last = is_last
        sizes = [len(group["params"]) for slot in self._slots for group in slot.optimizer.param_groups]
        if sizes != self._group_sizes:
            self._group_sizes = sizes
            self._share_new_parameters()
        return contextlib.nullcontext()

    def _share_new_parameters(self) -> None:
        for parameter in all_parameters(self._slots):
            if parameter not in self._shared:
                dist.broadcast(parameter.detach(), src=0)
                self._shared.add(parameter)

    @override
    def backward(self, loss: Tensor) -> None:
        with self._reducer.during_backward() if self._is_last else contextlib.nullcontext():
            super().backward(loss)

    @override
    def stop_overlapping(self) -> None:
        self._overlaps = False
        for reducer in self._reducers.values():
            reducer.overlaps = False

    @override
    def unscale_gradients(self) -> None:
        """Complete the averages of the gradients, and remove the scaling."""
        self._reducer.finish()
        super().unscale_gradients()

    @override
    def update(self, closure: Closure | None = None) -> bool:
        """Step, clear the gradients, and copy rank 0's buffers to all ranks."""
        happened = super().update(closure and averaged(closure))
        broadcast_buffers(self._trained)
        return happened

    @override
    def close(self) -> None:
        for reducer in self._reducers.values():
            reducer.close()

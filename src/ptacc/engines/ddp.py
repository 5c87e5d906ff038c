"""The engine for torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ptacc.engines.base import OptimizerSlot
from ptacc.engines.common import broadcast_buffers
from ptacc.engines.default import TorchEngine
from ptacc.engines.reduction import ReductionCheck
from ptacc.types.protocols import AcceleratorProtocol


class DDPEngine(TorchEngine):
    """Averages the gradients by DistributedDataParallel, which wraps the model."""

    can_update_separately = False

    def __init__(self, accelerator: AcceleratorProtocol, model: nn.Module, slots: Sequence[OptimizerSlot]) -> None:
        """Wrap a model. A collective.

        Args:
            accelerator: The accelerator of the launch, with the settings of DistributedDataParallel.
            model: The user's model.
            slots: The optimizers.
        """
        super().__init__(accelerator, model, slots, uses_ddp=True)
        ddp = getattr(self._model, "_orig_mod", self._model)
        assert isinstance(ddp, DistributedDataParallel)
        ddp.broadcast_buffers = False  # `update` does, so that evaluations have equal buffers, too
        self._check = ReductionCheck(model, self._slots, ddp)

    @override
    def around_batch(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._model)

    @override
    def unscale_gradients(self) -> None:
        """Check that the gradients were averaged, and remove the scaling."""
        self._check.check()
        super().unscale_gradients()

    @override
    def update(self) -> bool:
        """Step, clear the gradients, and copy rank 0's buffers to all ranks: the forward pass has changed them."""
        happened = super().update()
        broadcast_buffers(self._unwrapped_model)
        return happened

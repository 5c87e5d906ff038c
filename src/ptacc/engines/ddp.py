"""The engine for torch's DistributedDataParallel."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from ptacc.distributed.accelerator import wrap_in_ddp
from ptacc.engines.base import Closure, OptimizerSlot
from ptacc.engines.common import averaged, broadcast_buffers
from ptacc.engines.default import TorchEngine
from ptacc.engines.reducer import OutsideModel
from ptacc.engines.reduction import ReductionCheck
from ptacc.types.protocols import AcceleratorProtocol


class DDPEngine(TorchEngine):
    """Averages the gradients by DistributedDataParallel.

    Steps call the user's model. The forward pass of DDP is that of the batch, from its start to its loss, so that a
    step may call methods and submodules of the model, and call them several times.
    """

    can_update_separately = False
    can_unfreeze = False

    def __init__(self, accelerator: AcceleratorProtocol, model: nn.Module, slots: Sequence[OptimizerSlot]) -> None:
        """Wrap a model, with the accelerator's settings of DistributedDataParallel. A collective."""
        super().__init__(accelerator, model, slots)
        self.ddp: DistributedDataParallel = wrap_in_ddp(accelerator, model)
        self.ddp.broadcast_buffers = False  # `update` does, so that evaluations have equal buffers, too
        self._needs_loss: bool = self.ddp.find_unused_parameters or self.ddp.static_graph
        self._outside = OutsideModel(model, self._trained, self._slots, accelerator.device)
        self._check = ReductionCheck(self._trained, self._slots, self.ddp)

    @override
    @contextlib.contextmanager
    def around_batch(self, *, is_last: bool) -> Generator[None]:
        """Run the block as the forward pass of DDP does: what it compiles is split at the buckets of gradients."""
        sync = contextlib.nullcontext() if is_last else self.ddp.no_sync()
        with sync, self.ddp._inside_ddp_forward():  # noqa: SLF001  # torch has no public way
            self.ddp._pre_forward()  # type: ignore[no-untyped-call]  # noqa: SLF001
            if not self._needs_loss:  # then a backward pass by hand is prepared for, too
                self.ddp._post_forward(())  # type: ignore[no-untyped-call]  # noqa: SLF001
            yield

    @override
    def backward(self, loss: Tensor) -> None:
        if self._needs_loss:  # to find the parameters that the step has used
            loss = self.ddp._post_forward(loss)  # type: ignore[no-untyped-call]  # noqa: SLF001
        super().backward(loss)

    @override
    def unscale_gradients(self) -> None:
        """Average the gradients outside of the model, check those of all parameters, and remove the scaling."""
        self._outside.reduce()
        self._check.check()
        super().unscale_gradients()

    @override
    def update(self, closure: Closure | None = None) -> bool:
        """Step, clear the gradients, and copy rank 0's buffers to all ranks: the forward pass has changed them."""
        happened = super().update(closure and averaged(closure))
        broadcast_buffers(self._trained)
        return happened

    @override
    def close(self) -> None:
        self._outside.close()

"""Optimizers that step by a closure."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import CompositionError, OptionError
from ptacc.loop.updates import MultiUpdateLoop
from ptacc.model.optimizer_dict import OptimizerDict


class ClosureMixin(Mixin):
    """Calls the optimizer's `step` with a closure, for optimizers such as LBFGS and SAM.

    The closure computes the loss and the gradients of the step again, at the present weights: over all batches of the
    step and all processes. `train_step` and `on_gradients_ready` are called again for it. Random numbers are the same
    in each call, and buffers of the model, such as the statistics of batch norm, start from the same values. After the
    step, both are as after the first call. Losses, logged values, metrics and `on_batch_end` are those of the first
    call, at the weights before the step.

    The gradients of the step are computed before `optimizer.step(closure)`, as some optimizers expect. If the optimizer
    calls the closure at first, before it changes the weights, they are used again.

    Hooks: `on_run_start`.

    Combines with: everything except `MultiUpdateLoop`, several optimizers, `FSDPMixin`, `TensorParallelMixin`,
    `DeepSpeedMixin`, and the precision fp16, which scales gradients.

    Example:
        >>> from ptacc import ClosureMixin, Trainer
        >>> class MyTrainer(ClosureMixin, Trainer): ...
    """

    steps_by_closure: ClassVar[bool] = True

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        if isinstance(self, MultiUpdateLoop):
            raise CompositionError(f"{owner}: a MultiUpdateLoop has no closure of its step. Leave ClosureMixin out.")
        if isinstance(self.optimizer, OptimizerDict) and len(self.optimizer) > 1:
            raise OptionError(
                f"{owner}(optimizer=...): several optimizers cannot step by one closure. Give one, or leave "
                "ClosureMixin out."
            )

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        if not self.run.engine.can_step_by_closure:
            raise OptionError(
                f"{type(self).__name__}: ClosureMixin needs a replica of the model on each process, and no gradient "
                f"scaler. The engine is {type(self.run.engine).__name__}, in precision "
                f"{self.accelerator.mixed_precision}. Leave FSDPMixin, TensorParallelMixin and DeepSpeedMixin out, and "
                "use bf16 in place of fp16."
            )

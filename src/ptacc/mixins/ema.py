"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import NoRunError, OptionError
from ptacc.model.averaging import AveragedWeights
from ptacc.run.state import StateKey
from ptacc.run.step_result import StepResult

EMA_STATE: StateKey[AveragedWeights] = StateKey("ema")


class EMAMixin(Mixin):
    """Maintains an exponential moving average (EMA) of the weights, and evaluates with it.

    The average starts with the weights before the first step, and is updated after each step:
    `average = ema_decay * average + (1 - ema_decay) * weights`. Floating-point and complex buffers are averaged too;
    other buffers are the model's own. Training uses the weights themselves. Evaluations and predictions use the
    average, during the run and after it, until other weights are loaded.

    Options:
        ema_decay: The decay factor, at least 0 (no averaging) and less than 1.
        ema_evaluates: Whether evaluations and predictions use the average.

    Hooks: `on_run_start`, `on_epoch_start`, `on_step_end`, `on_run_end`, `around_evaluation_weights`.

    Combines with: everything. Steps that the gradient scaler skips do not update the average.

    Example:
        >>> from ptacc import EMAMixin, Trainer
        >>> class MyTrainer(EMAMixin, Trainer):
        ...     ema_decay: float = 0.999
    """

    ema_decay: float
    ema_evaluates: bool = True

    @override
    def check_options(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise OptionError(
                f"{type(self).__name__}(ema_decay={self.ema_decay!r}): must be at least 0 and less than 1."
            )

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        self.run[EMA_STATE] = AveragedWeights(self.trained_modules)

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        if not self.run[EMA_STATE].updates:  # a callback or a checkpoint may have changed the weights
            self.run[EMA_STATE].copy_from(self.trained_modules)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.run[EMA_STATE].update(self.trained_modules, weight=1 - self.ema_decay)

    @override
    def on_run_end(self) -> None:
        self.run[EMA_STATE].sync_buffers(self.trained_modules, self.distributed.broadcast)
        super().on_run_end()

    @contextlib.contextmanager
    def averaged_weights(self) -> Generator[None]:
        """Give the model the averages for the block: those of the run, or of a checkpoint that was loaded after it.

        Raises:
            NoRunError: There are no averages of the model's present weights.
        """
        if (averages := self._averages(EMA_STATE.name)) is None:
            raise NoRunError(
                f"{type(self).__name__}.averaged_weights(): the model's present weights have no averages. Train it, or "
                "load a checkpoint with averages, first."
            )
        with super().around_evaluation_weights(), averages.applied(self.trained_modules):
            yield

    @override
    @contextlib.contextmanager
    def around_evaluation_weights(self) -> Generator[None]:
        averages = self._averages(EMA_STATE.name) if self.ema_evaluates else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(super().around_evaluation_weights())
            if averages is not None and averages.updates:  # before the first update, they may be of other weights
                stack.enter_context(averages.applied(self.trained_modules))
            yield

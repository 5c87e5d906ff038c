"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import OptionError
from ptacc.model.averaging import AveragedWeights
from ptacc.run.history import StepResult
from ptacc.run.state import StateKey

EMA_STATE: StateKey[AveragedWeights] = StateKey("ema")


class EMAMixin(Mixin):
    """Maintains an exponential moving average (EMA) of the weights, and evaluates with it.

    The average is updated after each step: `average = ema_decay * average + (1 - ema_decay) * weights`. Floating-point
    buffers are averaged too; integer buffers are copied. Training uses the weights themselves. Evaluations and
    predictions use the average, during the run and after it.

    Options:
        ema_decay: The decay factor, at least 0 (no averaging) and less than 1.
        ema_evaluates: Whether evaluations and predictions use the average.

    Hooks: `on_run_start`, `on_step_end`, `around_evaluation_weights`.

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
        self.run[EMA_STATE] = AveragedWeights(self.unwrapped_model)

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.run[EMA_STATE].update(self.unwrapped_model, weight=1 - self.ema_decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Swap in the average of the current or last run for the block."""
        with self.run[EMA_STATE].applied(self.unwrapped_model):
            yield

    @override
    @contextlib.contextmanager
    def around_evaluation_weights(self) -> Iterator[None]:
        has_average = self.has_run and EMA_STATE in self.run
        weights = self.averaged_weights() if self.ema_evaluates and has_average else contextlib.nullcontext()
        with weights, super().around_evaluation_weights():
            yield

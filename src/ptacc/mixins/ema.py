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
    """Keeps an exponential moving average of the weights, moved once a step, and evaluates with it.

    Floating tensors are averaged, buffers among them; integer buffers are copied. The model trains on with its own
    weights; evaluations within the run and after it see the averages.

    Options:
        ema_decay: What is kept of the average at each step, from 0 (the present weights) to less than 1.
        ema_evaluates: Whether evaluations and predictions use the averages.

    Hooks: `on_run_start`, `on_step_end`, `around_evaluation_weights`.

    Combines with: everything. A step that the gradient scaler skipped moves nothing.

    Example:
        >>> from ptacc import EMAMixin, Trainer
        >>> class MyTrainer(EMAMixin, Trainer):
        ...     ema_decay: float = 0.999
    """

    ema_decay: float
    ema_evaluates: bool = True

    @override
    def check_options(self) -> None:
        """Refuse a decay outside its range."""
        if not 0 <= self.ema_decay < 1:
            raise OptionError(f"{type(self).__name__}(ema_decay={self.ema_decay!r}): must be from 0 to less than 1.")

    @override
    def on_run_start(self) -> None:
        """Start from the present weights."""
        super().on_run_start()
        self.run[EMA_STATE] = AveragedWeights(self.unwrapped_model)

    @override
    def on_step_end(self, step: StepResult) -> None:
        """Move the averages."""
        super().on_step_end(step)
        self.run[EMA_STATE].update(self.unwrapped_model, weight=1 - self.ema_decay)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Have the averages of the current run, or of the last one, in the model for the block."""
        with self.run[EMA_STATE].applied(self.unwrapped_model):
            yield

    @override
    @contextlib.contextmanager
    def around_evaluation_weights(self) -> Iterator[None]:
        """Evaluate and predict with the averages, once there are any."""
        has_averages = self.has_run and EMA_STATE in self.run
        averages = self.averaged_weights() if self.ema_evaluates and has_averages else contextlib.nullcontext()
        with averages, super().around_evaluation_weights():
            yield

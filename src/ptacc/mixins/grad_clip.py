"""Gradient clipping."""

from __future__ import annotations

import math

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.run.step_result import StepResult
from ptacc.validation import check_positive


class GradClipMixin(Mixin):
    """Clips gradients before each optimizer step, after accumulation and unscaling.

    Options:
        max_grad_norm: Maximum 2-norm of all gradients together. The norm before clipping is logged as `grad_norm`;
            `math.inf` logs it without clipping.
        max_grad_value: Maximum magnitude of each entry of the gradients, applied before the norm is computed.

    Hooks: `on_gradients_ready`, `train_value_names`.

    Combines with: everything.

    Example:
        >>> from ptacc import GradClipMixin, Trainer
        >>> class MyTrainer(GradClipMixin, Trainer):
        ...     max_grad_norm = 1.0
    """

    max_grad_norm: float | None = None
    max_grad_value: float | None = None

    @override
    def check_options(self) -> None:
        owner, advice = type(self).__name__, "Leave it out to disable clipping."
        if self.max_grad_norm is not None and self.max_grad_norm != math.inf:
            check_positive(owner, "max_grad_norm", self.max_grad_norm, advice)
        if self.max_grad_value is not None:
            check_positive(owner, "max_grad_value", self.max_grad_value, advice)

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        if self.max_grad_value is not None:
            self.run.engine.clip_value(self.max_grad_value)
        if self.max_grad_norm is not None:
            step.logged["grad_norm"] = self.run.engine.clip_norm(self.max_grad_norm)

    @override
    def train_value_names(self) -> frozenset[str]:
        return super().train_value_names() | ({"grad_norm"} if self.max_grad_norm is not None else frozenset())

"""Gradient clipping."""

from __future__ import annotations

import math

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import OptionError
from ptacc.loop.updates import MultiUpdateLoop
from ptacc.run.gradient_norms import GradientNorms
from ptacc.run.state import StateKey
from ptacc.run.step_result import StepResult
from ptacc.validation import check_positive

GRADIENT_NORMS: StateKey[GradientNorms] = StateKey("gradient_norms")


class GradClipMixin(Mixin):
    """Clips gradients before each optimizer step, after accumulation and unscaling.

    Options:
        max_grad_norm: Maximum 2-norm of all gradients together. The norm before clipping is logged as `grad_norm`;
            `math.inf` logs it without clipping.
        max_grad_deviations: Clip spikes: the maximum norm is the running mean of the norms plus this many of their
            standard deviations, from the 26th step on. Nothing is read from the device. `grad_spikes` is logged: 1
            for a step that was clipped by it, so that its mean is their share.
        max_grad_value: Maximum magnitude of each entry of the gradients, applied before the norm is computed.

    Hooks: `on_run_start`, `on_gradients_ready`, `train_value_names`.

    Combines with: everything.

    Example:
        >>> from ptacc import GradClipMixin, Trainer
        >>> class MyTrainer(GradClipMixin, Trainer):
        ...     max_grad_norm = 1.0
    """

    max_grad_norm: float | None = None
    max_grad_deviations: float | None = None
    max_grad_value: float | None = None

    @override
    def check_options(self) -> None:
        owner, advice = type(self).__name__, "Leave it out to disable clipping."
        if self.max_grad_norm is not None and self.max_grad_norm != math.inf:
            check_positive(owner, "max_grad_norm", self.max_grad_norm, advice)
        if self.max_grad_deviations is not None:
            check_positive(owner, "max_grad_deviations", self.max_grad_deviations, advice)
            if isinstance(self, MultiUpdateLoop):
                raise OptionError(f"{owner}(max_grad_deviations=...): needs one update per step. Set max_grad_norm.")
        if self.max_grad_value is not None:
            check_positive(owner, "max_grad_value", self.max_grad_value, advice)

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        if self.max_grad_deviations is not None:
            self.run[GRADIENT_NORMS] = GradientNorms(self.device)

    @override
    def on_gradients_ready(self, step: StepResult) -> None:
        super().on_gradients_ready(step)
        if self.max_grad_value is not None:
            self.run.engine.clip_value(self.max_grad_value)
        if self.max_grad_deviations is not None:
            norms = self.run[GRADIENT_NORMS]
            limit = norms.limit(self.max_grad_deviations)
            norm = self.run.engine.clip_norm(
                limit if self.max_grad_norm is None else limit.clamp(max=self.max_grad_norm)
            )
            norms.add(norm, limit)
            step.logged |= {"grad_norm": norm, "grad_spikes": (norm > limit).to(norm.dtype)}
        elif self.max_grad_norm is not None:
            step.logged["grad_norm"] = self.run.engine.clip_norm(self.max_grad_norm)

    @override
    def train_value_names(self) -> frozenset[str]:
        names = frozenset({"grad_norm"} if self.max_grad_norm is not None else ())
        spikes = frozenset({"grad_norm", "grad_spikes"} if self.max_grad_deviations is not None else ())
        return super().train_value_names() | names | spikes

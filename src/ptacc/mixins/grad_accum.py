"""Gradient accumulation."""

from __future__ import annotations

import os

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.distributed.accelerator import LAUNCH_FEATURES, AcceleratorBuilder
from ptacc.errors import LaunchError
from ptacc.validation import check_at_least


class GradAccumMixin(Mixin):
    """Takes several batches for one optimizer step.

    The gradient is that of the mean over all items of the step, however many batches they come in: a shorter last
    step of an epoch and ragged batches are weighted by what is in them.

    Options:
        gradient_accumulation_steps: Batches of each process for one step, at least 1.

    Hooks: `accumulation_steps`, `configure_accelerator`.

    Combines with: everything. Between processes, gradients are exchanged once a step.

    Example:
        >>> from ptacc import GradAccumMixin, Trainer
        >>> class MyTrainer(GradAccumMixin, Trainer):
        ...     gradient_accumulation_steps = 4
    """

    gradient_accumulation_steps: int = 1

    @override
    def check_options(self) -> None:
        """Refuse a count below 1."""
        check_at_least(
            type(self).__name__,
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps,
            1,
            "Leave it out to step after every batch.",
        )

    @override
    def accumulation_steps(self) -> int:
        """Return the number of batches of a step."""
        return self.gradient_accumulation_steps

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Refuse a launch that asks for another number; the accelerator itself knows nothing of accumulation."""
        super().configure_accelerator(builder)
        builder.provide("accumulation")
        variable = LAUNCH_FEATURES["accumulation"].variable
        launched = os.environ.get(variable)
        if launched and launched != str(self.gradient_accumulation_steps):
            raise LaunchError(
                f"The launch set {variable}={launched}, and {type(self).__name__} has "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}. Give both the same number."
            )

"""Gradient accumulation."""

from __future__ import annotations

import os

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.distributed.accelerator import LAUNCH_FEATURES, AcceleratorBuilder
from ptacc.errors import LaunchError
from ptacc.types.accumulation import AccumulationOption, AccumulationSchedule


class GradAccumMixin(Mixin):
    """Accumulates the gradients of several batches for each optimizer step.

    The gradient is that of the mean loss over all items of the step. Batches of different sizes, and a last step of the
    epoch with fewer batches, are weighted by their items.

    Options:
        gradient_accumulation_steps: Batches of each rank per optimizer step, at least 1.
        accumulation_schedule: Further numbers of batches, from later on: `{Epochs(3): 4}` is 4 after 3 epochs, and
            `{Steps(1000): 2, Steps(5000): 4}` doubles twice.

    Hooks: `accumulation_steps`, `configure_accelerator`.

    Combines with: everything. Gradients are reduced across ranks once per step.

    Example:
        >>> from ptacc import GradAccumMixin, Trainer
        >>> class MyTrainer(GradAccumMixin, Trainer):
        ...     gradient_accumulation_steps = 4
    """

    gradient_accumulation_steps: int = 1
    accumulation_schedule: AccumulationOption = None

    @override
    def check_options(self) -> None:
        self.accumulation_steps()

    @override
    def accumulation_steps(self) -> AccumulationSchedule:
        owner, steps = type(self).__name__, self.gradient_accumulation_steps
        return AccumulationSchedule.read(owner, steps, self.accumulation_schedule)

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        super().configure_accelerator(builder)
        builder.provide("accumulation")
        variable = LAUNCH_FEATURES["accumulation"].variable
        launched = os.environ.get(variable)
        if launched and launched != str(self.gradient_accumulation_steps):
            raise LaunchError(
                f"The launch sets {variable}={launched}, and {type(self).__name__} has "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps}. Give both the same number."
            )

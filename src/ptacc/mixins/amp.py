"""Mixed precision."""

from __future__ import annotations

from typing import get_args

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.types.aliases import Precision
from ptacc.validation import check_choice


class AMPMixin(Mixin):
    """Runs the forward pass in a lower precision, with a gradient scaler where it needs one.

    Options:
        mixed_precision: `"bf16"`, `"fp16"` or `"no"`; None for what the launch says, which is `"no"` if
            it says nothing. fp16 needs a GPU.

    Hooks: `configure_accelerator`.

    Combines with: everything. The scaler's factor is out of the gradients before anyone clips or looks at them.

    Example:
        >>> from ptacc import AMPMixin, Trainer
        >>> from ptacc.protocols import Precision
        >>> class MyTrainer(AMPMixin, Trainer):
        ...     mixed_precision: Precision | None = "bf16"
    """

    mixed_precision: Precision | None = None

    @override
    def check_options(self) -> None:
        """Refuse a precision that is none."""
        owner, choices = type(self).__name__, get_args(Precision)
        check_choice(owner, "mixed_precision", self.mixed_precision, choices, "what the launch says")

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Set the accelerator's precision."""
        super().configure_accelerator(builder)
        if self.mixed_precision is not None:
            builder.write(AMPMixin, mixed_precision=self.mixed_precision)

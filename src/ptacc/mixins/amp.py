"""Mixed precision."""

from __future__ import annotations

from typing import get_args

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.types.aliases import Precision
from ptacc.validation import check_choice


class AMPMixin(Mixin):
    """Runs the forward pass in lower precision, with a gradient scaler for fp16.

    Options:
        mixed_precision: `"bf16"`, `"fp16"` or `"no"`; None for the setting of the launch, `"no"` if it has none. fp16
            needs a GPU.

    Hooks: `configure_accelerator`.

    Combines with: everything. Gradients are unscaled before they are clipped, and before `on_gradients_ready`.

    Example:
        >>> from ptacc import AMPMixin, Trainer
        >>> from ptacc.protocols import Precision
        >>> class MyTrainer(AMPMixin, Trainer):
        ...     mixed_precision: Precision | None = "bf16"
    """

    mixed_precision: Precision | None = None

    @override
    def check_options(self) -> None:
        owner, choices = type(self).__name__, get_args(Precision)
        check_choice(owner, "mixed_precision", self.mixed_precision, choices, "the setting of the launch")

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        super().configure_accelerator(builder)
        if self.mixed_precision is not None:
            builder.write(AMPMixin, mixed_precision=self.mixed_precision)

"""Early stopping."""

from __future__ import annotations

import math

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.core.monitoring import Patience, epoch_values, evaluated_values
from ptacc.errors import OptionError
from ptacc.run.state import StateKey
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.progress import Epochs, Steps
from ptacc.validation import check_at_least

PATIENCE: StateKey[Patience] = StateKey("early_stopping")


class EarlyStoppingMixin(Mixin):
    """Stops the run when a monitored value has stopped improving.

    A value of an evaluation set is checked after each evaluation of that set; any other value at the end of each epoch.

    Options:
        early_stopping_monitor: The value to monitor: a name or a `Monitor`.
        early_stopping_mode: `"min"` if lower values are better, `"max"` if higher ones are. A `Monitor` has its own.
        early_stopping_patience: Number of checks without improvement after which the run stops, at least 1.
        early_stopping_min_delta: Minimum change that counts as an improvement, at least 0.
        early_stopping_after: Time before which the run does not stop: `Epochs(10)` is after ten complete epochs, and
            `Steps(1000)` after 1000 steps. Earlier checks count, too.

    Hooks: `on_run_start`, `on_evaluation_end`, `on_epoch_end`, `should_stop`, `monitors`.

    Combines with: everything. All ranks stop at the same step.

    Example:
        >>> from ptacc import EarlyStoppingMixin, Trainer
        >>> class MyTrainer(EarlyStoppingMixin, Trainer):
        ...     early_stopping_patience = 5
    """

    early_stopping_monitor: str | Monitor = "eval_loss"
    early_stopping_mode: Mode = "min"
    early_stopping_patience: int = 3
    early_stopping_min_delta: float = 0.0
    early_stopping_after: Epochs | Steps | None = None

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        check_at_least(owner, "early_stopping_patience", self.early_stopping_patience, 1)
        if not isinstance(self.early_stopping_after, Epochs | Steps | None):
            raise OptionError(
                f"{owner}(early_stopping_after={self.early_stopping_after!r}): must be Epochs(10), Steps(1000) or None."
            )
        if not 0 <= self.early_stopping_min_delta < math.inf:
            raise OptionError(
                f"{owner}(early_stopping_min_delta={self.early_stopping_min_delta!r}): must be finite and at least 0."
            )

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        monitor = as_monitor(self.early_stopping_monitor, self.early_stopping_mode)
        self.run[PATIENCE] = Patience(monitor, self.early_stopping_min_delta)

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        if values := evaluated_values(self, name, result):
            self.run[PATIENCE].observe_if_reported(values)

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        self.run[PATIENCE].observe_if_reported(epoch_values(record))

    @override
    def should_stop(self) -> str | None:
        reason, patience = super().should_stop(), self.run[PATIENCE]
        if reason is not None or patience.num_bad < self.early_stopping_patience:
            return reason
        if self.early_stopping_after is not None and not self.early_stopping_after.is_reached(self.progress):
            return None
        return f"{patience.monitor.name} did not improve on {patience.best:.6g} in {patience.num_bad} checks"

    @override
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        return (*super().monitors(), (self, as_monitor(self.early_stopping_monitor, self.early_stopping_mode)))

"""Early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.errors import OptionError
from ptacc.run.state import StateKey
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.validation import check_at_least


@dataclass
class Patience:
    """How long a value has not become better.

    Args:
        monitored: The value.
        min_delta: What it must become better by.
        best: The best so far, NaN before the first.
        waited: Observations since then.
    """

    monitored: Monitor
    min_delta: float = 0.0
    best: float = math.nan
    waited: int = 0

    def observe(self, value: float) -> None:
        """Take a value in. NaN is never better, and waits like any other."""
        bar = self.best + (self.min_delta if self.monitored.mode == "max" else -self.min_delta)
        if self.monitored.is_better(value, than=bar):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and how long ago it was."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state."""
        self.best, self.waited = state_dict["best"], state_dict["waited"]


PATIENCE: StateKey[Patience] = StateKey("early_stopping")


class EarlyStoppingMixin(Mixin):
    """Stops a run whose monitored value does not become better any more.

    A value of an evaluation is looked at after each evaluation of its set, any other at the end of each epoch.

    Options:
        early_stopping_monitor: The value, by its name or handle.
        early_stopping_mode: Whether less or more is better; a handle knows that itself.
        early_stopping_patience: Looks in a row without a better value before the run stops, at least 1.
        early_stopping_min_delta: What a value must be better by, at least 0.

    Hooks: `on_run_start`, `on_evaluation_end`, `on_epoch_end`, `should_stop`, `monitors`.

    Combines with: everything. All processes stop at the same step.

    Example:
        >>> from ptacc import EarlyStoppingMixin, Trainer
        >>> class MyTrainer(EarlyStoppingMixin, Trainer):
        ...     early_stopping_patience = 5
    """

    early_stopping_monitor: str | Monitor = "eval_loss"
    early_stopping_mode: Mode = "min"
    early_stopping_patience: int = 3
    early_stopping_min_delta: float = 0.0

    @override
    def check_options(self) -> None:
        """Refuse a patience below 1 and a negative difference."""
        owner = type(self).__name__
        check_at_least(owner, "early_stopping_patience", self.early_stopping_patience, 1)
        if not 0 <= self.early_stopping_min_delta < math.inf:
            raise OptionError(
                f"{owner}(early_stopping_min_delta={self.early_stopping_min_delta!r}): must be finite and at least 0."
            )

    @override
    def on_run_start(self) -> None:
        """Start to wait anew."""
        super().on_run_start()
        monitored = as_monitor(self.early_stopping_monitor, self.early_stopping_mode)
        self.run[PATIENCE] = Patience(monitored, self.early_stopping_min_delta)

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        """Look at a value of the evaluation."""
        super().on_evaluation_end(name, result)
        values = result.values(name)
        if (
            self.has_run
            and self.run.is_scheduled_evaluation
            and (monitor := self.run[PATIENCE].monitored.name) in values
        ):
            self.run[PATIENCE].observe(values[monitor])

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        """Look at a value of the epoch that no evaluation gave."""
        super().on_epoch_end(record)
        evaluated = {name for set_name, result in record.evaluations.items() for name in result.values(set_name)}
        monitor = self.run[PATIENCE].monitored.name
        if monitor not in evaluated and monitor in record.values():
            self.run[PATIENCE].observe(record.values()[monitor])

    @override
    def should_stop(self) -> str | None:
        """Stop when patience is at its end."""
        return super().should_stop() or self._impatience()

    def _impatience(self) -> str | None:
        patience = self.run[PATIENCE]
        if patience.waited < self.early_stopping_patience:
            return None
        return f"{patience.monitored.name} did not become better than {patience.best:.6g} in {patience.waited} looks"

    @override
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        """Watch the monitored value."""
        return (*super().monitors(), (self, as_monitor(self.early_stopping_monitor, self.early_stopping_mode)))

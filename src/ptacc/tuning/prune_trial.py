"""Stop the run of an Optuna trial that Optuna prunes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.protocols import StateDict

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

REASON = "the trial is pruned"


class PruneTrial(Callback[TrainerCore]):
    """Reports a value to an Optuna trial, and stops the run when the trial is to be pruned.

    Optuna compares reports of trials by their number, 1 for the first one. It may differ from the number of steps, so
    that trials with different batch sizes are compared.

    Args:
        trial: The trial. On several processes an `optuna_integration.TorchDistributedTrial`, on each of them.
        monitor: The name of the value, or a `Monitor`. The study has to have the direction of the value.

    Example:
        >>> def objective(trial: optuna.Trial) -> float:  # doctest: +SKIP
        ...     pruning = PruneTrial(trial, "eval_loss")
        ...     make_trainer(trial, callbacks=[pruning]).train(train, validation, num_epochs=10)
        ...     return pruning.result()
    """

    def __init__(self, trial: BaseTrial, monitor: str | Monitor) -> None:
        self._trial, self._monitor = trial, as_monitor(monitor)
        self._value, self._reports, self._is_pruned = math.nan, 0, False

    def result(self) -> float:
        """Return the last value that was reported. Call it after `train()`.

        A pruned run ends as a stopped one, since an exception in a run ends all processes of the launch.

        Raises:
            optuna.TrialPruned: The run was stopped to prune the trial.
        """
        if self._is_pruned:
            from optuna import TrialPruned

            raise TrialPruned(f"pruned after {self._reports} reports of {self._monitor.name!r}")
        return self._value

    @override
    def monitors(self) -> tuple[Monitor, ...]:
        return (self._monitor,)

    @override
    def on_values(self, trainer: TrainerCore, values: Mapping[str, float], step: int) -> None:
        if self._monitor.name in values:
            self._value = values[self._monitor.name]
            self._reports += 1
            self._trial.report(self._value, self._reports)
            if self._trial.should_prune():
                self._is_pruned = True
                trainer.stop(REASON)

    def state_dict(self) -> StateDict:
        """Return the number of reports."""
        return {"reports": self._reports}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what `state_dict` returned."""
        self._reports = state_dict["reports"]

"""Save whenever a value becomes better."""

from __future__ import annotations

import math

from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EvalResult
from ptacc.types.protocols import StateDict, SupportsCheckpoint


class SaveBest(Callback[SupportsCheckpoint]):
    """Has the run saved after each evaluation of the run's own that is the best so far, whatever the cadence.

    The newest such checkpoint is always kept: it is labelled with the value's name.

    Attributes:
        best_value: The best value so far, NaN before the first.
    """

    def __init__(self, monitor: str | Monitor, mode: Mode = "min") -> None:
        """Watch a value of an evaluation.

        Args:
            monitor: The value's name or handle.
            mode: Whether less or more is better; a handle knows that itself.
        """
        self.best_value: float = math.nan
        self._monitored = as_monitor(monitor, mode)

    @override
    def monitors(self) -> tuple[Monitor, ...]:
        """Return the value watched."""
        return (self._monitored,)

    @override
    def on_run_start(self, trainer: SupportsCheckpoint) -> None:
        """Forget an earlier run."""
        self.best_value = math.nan

    @override
    def on_evaluation_end(self, trainer: SupportsCheckpoint, name: str, result: EvalResult) -> None:
        """Ask for a checkpoint if this is the best."""
        value = result.values(name).get(self._monitored.name, math.nan)
        is_the_runs_own = (
            isinstance(trainer, TrainerCore) and trainer.is_running and trainer.run.is_scheduled_evaluation
        )
        if is_the_runs_own and self._monitored.is_better(value, than=self.best_value):
            self.best_value = value
            trainer.save_checkpoint(label=self._monitored.name)

    def state_dict(self) -> StateDict:
        """Return the best value."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a best value."""
        self.best_value = state_dict["best_value"]

"""Save a checkpoint whenever a monitored value improves."""

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
    """Saves a checkpoint after each scheduled evaluation of a run that is the best so far.

    Checkpoints are labelled with the name of the value. The newest one with that label is never deleted.

    Args:
        monitor: The name of an evaluated value, or a `Monitor`.
        mode: Whether a lower or a higher value is better; a `Monitor` has its own mode.

    Attributes:
        best_value: The best value so far, NaN before the first.
    """

    def __init__(self, monitor: str | Monitor, mode: Mode = "min") -> None:
        self.best_value: float = math.nan
        self._monitor = as_monitor(monitor, mode)

    @override
    def monitors(self) -> tuple[Monitor, ...]:
        return (self._monitor,)

    @override
    def on_run_start(self, trainer: SupportsCheckpoint) -> None:
        self.best_value = math.nan

    @override
    def on_evaluation_end(self, trainer: SupportsCheckpoint, name: str, result: EvalResult) -> None:
        value = result.values(name).get(self._monitor.name, math.nan)
        is_scheduled = isinstance(trainer, TrainerCore) and trainer.is_running and trainer.run.is_scheduled_evaluation
        if is_scheduled and self._monitor.is_better(value, than=self.best_value):
            self.best_value = value
            trainer.save_checkpoint(label=self._monitor.name)

    def state_dict(self) -> StateDict:
        """Return the state for a checkpoint."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state of a checkpoint."""
        self.best_value = state_dict["best_value"]

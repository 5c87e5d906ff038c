"""When monitored values are reported: an evaluated value at each evaluation, any other value at the end of an epoch."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic

from typing_extensions import override

from ptacc.core.callback import Callback, TrainerT_contra
from ptacc.core.hooks import TrainerCore
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.protocols import StateDict


def evaluated_values(trainer: object, name: str, result: EvalResult) -> dict[str, float]:
    """Return the values of an evaluation by name. Evaluations that a hook or a user calls report none to monitors."""
    is_scheduled = isinstance(trainer, TrainerCore) and trainer.has_run and trainer.run.is_scheduled_evaluation
    return result.values(name) if is_scheduled else {}


def epoch_values(record: EpochRecord) -> dict[str, float]:
    """Return the values of an epoch that no evaluation reports."""
    return replace(record, evaluations={}).values()


class BestValue(Callback[TrainerT_contra], Generic[TrainerT_contra]):
    """Base of callbacks that act whenever a monitored value is the best so far, before any further step.

    Args:
        monitor: The name of the value, or a `Monitor`.
        mode: Whether a lower or a higher value is better; a `Monitor` has its own mode.

    Attributes:
        best_value: The best value so far, NaN before the first.
        best_epoch: The epoch that reported it, counted from 1; 0 before the first step.
        best_step: The number of steps at that time.
    """

    best_value: float
    best_epoch: int
    best_step: int

    def __init__(self, monitor: str | Monitor, mode: Mode = "min") -> None:
        self._monitor = as_monitor(monitor, mode)
        self._reset()

    @abstractmethod
    def _act(self, trainer: TrainerT_contra) -> None:
        """Act on the present weights, which are the best so far."""

    def _reset(self) -> None:
        self.best_value, self.best_epoch, self.best_step = math.nan, 0, 0

    @override
    def monitors(self) -> tuple[Monitor, ...]:
        return (self._monitor,)

    @override
    def on_run_start(self, trainer: TrainerT_contra) -> None:
        self._reset()

    @override
    def on_evaluation_end(self, trainer: TrainerT_contra, name: str, result: EvalResult) -> None:
        self._observe(trainer, evaluated_values(trainer, name, result))

    @override
    def on_epoch_end(self, trainer: TrainerT_contra, record: EpochRecord) -> None:
        self._observe(trainer, epoch_values(record))

    def _observe(self, trainer: TrainerT_contra, values: dict[str, float]) -> None:
        value = values.get(self._monitor.name, math.nan)
        if self._monitor.is_better(value, than=self.best_value):
            assert isinstance(trainer, TrainerCore)
            progress = trainer.progress
            self.best_value, self.best_step = value, progress.steps
            self.best_epoch = progress.epochs + trainer.run.is_within_epoch
            self._act(trainer)

    def state_dict(self) -> StateDict:
        """Return the state for a checkpoint."""
        return {"best_value": self.best_value, "best_epoch": self.best_epoch, "best_step": self.best_step}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state of a checkpoint."""
        self.best_value, self.best_epoch = state_dict["best_value"], state_dict["best_epoch"]
        self.best_step = state_dict["best_step"]


@dataclass
class Patience:
    """Counts observations since the last improvement of a value.

    Args:
        monitor: The value, and whether lower or higher is better.
        min_delta: The least change that counts as an improvement.
        best: The best value so far, NaN before the first observation.
        num_bad: Observations since the best one.
    """

    monitor: Monitor
    min_delta: float = 0.0
    best: float = math.nan
    num_bad: int = 0

    def observe(self, value: float) -> None:
        """Compare a value with the best one. NaN is never an improvement."""
        threshold = self.best + (self.min_delta if self.monitor.mode == "max" else -self.min_delta)
        if self.monitor.is_better(value, than=threshold):
            self.best, self.num_bad = value, 0
        else:
            self.num_bad += 1

    def observe_if_reported(self, values: Mapping[str, float]) -> None:
        """Compare the monitored value with the best one, if it is among `values`."""
        if self.monitor.name in values:
            self.observe(values[self.monitor.name])

    def state_dict(self) -> dict[str, Any]:
        """Return the best value, and the number of observations since then."""
        return {"best": self.best, "num_bad": self.num_bad}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self.best, self.num_bad = state_dict["best"], state_dict["num_bad"]

"""The best model, kept in memory."""

from __future__ import annotations

import math

from torch import Tensor
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.errors import OptionError
from ptacc.model.averaging import AveragedWeights
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EpochRecord
from ptacc.types.protocols import StateDict, SupportsSWA


class RestoreBestWeights(Callback[TrainerCore]):
    """Keeps a copy of the weights of the best epoch in the host's memory, and ends the run with them.

    They are those that evaluations see: with `EMAMixin`, the averages.

    Attributes:
        best_value: The best value so far, NaN before the first.
        best_epoch: The epoch that reported it, 0 before the first.
    """

    def __init__(self, monitor: str | Monitor, *, mode: Mode = "min", restore: bool = True) -> None:
        """Watch a value.

        Args:
            monitor: The value's name or handle.
            mode: Whether less or more is better; a handle knows that itself.
            restore: Whether to load the best weights into the model at the end of the run.
        """
        self.best_value: float = math.nan
        self.best_epoch: int = 0
        self._monitored, self._restore = as_monitor(monitor, mode), restore
        self._weights: dict[str, Tensor] = {}

    @property
    def best_weights(self) -> dict[str, Tensor]:
        """The weights of the best epoch, on the host; empty before the first."""
        return self._weights

    def state_dict(self) -> StateDict:
        """Return the best value, its epoch, and the weights."""
        return {"best_value": self.best_value, "best_epoch": self.best_epoch, "weights": self._weights}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Go on from a best epoch."""
        self.best_value, self.best_epoch = state_dict["best_value"], state_dict["best_epoch"]
        self._weights = dict(state_dict["weights"])

    @override
    def monitors(self) -> tuple[Monitor, ...]:
        """Return the value watched."""
        return (self._monitored,)

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        """Forget an earlier run."""
        if self._restore and isinstance(trainer, SupportsSWA) and trainer.swa_start is not None:
            raise OptionError(
                f"RestoreBestWeights({self._monitored.name!r}) and swa_start={trainer.swa_start}: the run cannot end "
                "both with the best weights and with the average. Give restore=False, or leave out one of them."
            )
        self.best_value, self.best_epoch, self._weights = math.nan, 0, {}

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        """Keep the weights if this epoch is the best. An epoch without the value is passed over."""
        value = record.values().get(self._monitored.name, math.nan)
        if self._monitored.is_better(value, than=self.best_value):
            self.best_value, self.best_epoch = value, record.epoch
            with trainer.around_evaluation_weights():
                weights = trainer.unwrapped_model.state_dict()
                self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        """Load the best weights."""
        if self._restore and self._weights:
            trainer.unwrapped_model.load_state_dict(self._weights)
            for _, state in trainer.run.states():
                if isinstance(state, AveragedWeights):
                    state.copy_from(trainer.unwrapped_model)

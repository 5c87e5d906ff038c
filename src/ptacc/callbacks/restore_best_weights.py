"""Keep the best weights in memory, and load them at the end of the run."""

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
    """Copies the weights of the best epoch to host memory, and loads them into the model at the end of the run.

    The weights are those used for evaluation: with `EMAMixin`, the averages.

    Args:
        monitor: The name of the value, or a `Monitor`.
        mode: Whether a lower or a higher value is better; a `Monitor` has its own mode.
        restore: Whether to load the best weights into the model at the end of the run.

    Attributes:
        best_value: The best value so far, NaN before the first.
        best_epoch: The epoch that reported it, 0 before the first.
    """

    def __init__(self, monitor: str | Monitor, *, mode: Mode = "min", restore: bool = True) -> None:
        self.best_value: float = math.nan
        self.best_epoch: int = 0
        self._monitor, self._restore = as_monitor(monitor, mode), restore
        self._weights: dict[str, Tensor] = {}

    @property
    def best_weights(self) -> dict[str, Tensor]:
        """The weights of the best epoch, in host memory; empty before the first."""
        return self._weights

    def state_dict(self) -> StateDict:
        """Return the state for a checkpoint."""
        return {"best_value": self.best_value, "best_epoch": self.best_epoch, "weights": self._weights}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state of a checkpoint."""
        self.best_value, self.best_epoch = state_dict["best_value"], state_dict["best_epoch"]
        self._weights = dict(state_dict["weights"])

    @override
    def monitors(self) -> tuple[Monitor, ...]:
        return (self._monitor,)

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        if self._restore and isinstance(trainer, SupportsSWA) and trainer.swa_start is not None:
            raise OptionError(
                f"RestoreBestWeights({self._monitor.name!r}) and swa_start={trainer.swa_start}: the run cannot end "
                "both with the best weights and with the average. Pass restore=False, or leave out one of them."
            )
        self.best_value, self.best_epoch, self._weights = math.nan, 0, {}

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        value = record.values().get(self._monitor.name, math.nan)
        if self._monitor.is_better(value, than=self.best_value):
            self.best_value, self.best_epoch = value, record.epoch
            with trainer.around_evaluation_weights():
                weights = trainer.unwrapped_model.state_dict()
                self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        if self._restore and self._weights:
            trainer.unwrapped_model.load_state_dict(self._weights)
            for _, state in trainer.run.states():
                if isinstance(state, AveragedWeights):
                    state.copy_from(trainer.unwrapped_model)

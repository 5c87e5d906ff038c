"""Keep the best weights in memory, and load them at the end of the run."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from typing_extensions import override

from ptacc.core.frozen import find_trained, fingerprint_tensors, without
from ptacc.core.hooks import TrainerCore
from ptacc.core.module_options import parameters_of
from ptacc.core.monitoring import BestValue
from ptacc.errors import ModelError, OptionError
from ptacc.model.state_dict import copy_to_host, get_weights, load_weights
from ptacc.types.aliases import Mode
from ptacc.types.monitor import Monitor
from ptacc.types.outputs import EpochRecord
from ptacc.types.protocols import StateDict, SupportsSWA
from ptacc.validation import list_some


class RestoreBestWeights(BestValue[TrainerCore]):
    """Copies the best weights to host memory, and loads them into the model at the end of the run.

    Modules among the options that are trained with the model, such as a loss, have theirs copied and loaded too.

    An evaluated value is compared after each evaluation of the run, and the weights are those that were evaluated: with
    `EMAMixin`, the averages. Any other value, such as `train_loss`, is compared at the end of each epoch.

    Args:
        monitor: The name of the value, or a `Monitor`.
        mode: Whether a lower or a higher value is better; a `Monitor` has its own mode.
        restore: Whether to load the best weights into the model at the end of the run.
        frozen: Whether to copy frozen parameters, too. Pass False for a model with a large frozen part, which then has
            to stay as it is: a run that changes it afterwards ends with a `ModelError`.

    Attributes:
        best_value: The best value so far, NaN before the first.
        best_epoch: The epoch that reported it, counted from 1; 0 before the first step.
        best_step: The number of steps at that time.
        restore: Whether the run ends with the best weights.
    """

    def __init__(
        self, monitor: str | Monitor, *, mode: Mode = "min", restore: bool = True, frozen: bool = True
    ) -> None:
        self._weights: StateDict = {}
        self._outside: dict[str, StateDict] = {}
        self._left_out: dict[str, str] = {}
        super().__init__(monitor, mode)
        self.restore: bool = restore
        self._frozen = frozen

    @property
    def best_weights(self) -> StateDict:
        """The model's `state_dict()` with the best value, in host memory; empty before the first.

        With `frozen=False`, frozen parameters are not in it.
        """
        return self._weights

    @override
    def state_dict(self) -> StateDict:
        return {
            **super().state_dict(),
            "weights": self._weights,
            "outside": self._outside,
            "left_out": self._left_out,
        }

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        super().load_state_dict(state_dict)
        self._weights, self._outside = dict(state_dict["weights"]), dict(state_dict.get("outside", {}))
        self._left_out = dict(state_dict.get("left_out", {}))

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        super().on_run_start(trainer)
        if self.restore and isinstance(trainer, SupportsSWA) and trainer.swa_start is not None:
            raise OptionError(
                f"RestoreBestWeights({self._monitor.name!r}) and swa_start={trainer.swa_start}: the run cannot end "
                "both with the best weights and with the average. Pass restore=False, or leave out one of them."
            )

    @override
    def _reset(self) -> None:
        super()._reset()
        self._weights, self._outside, self._left_out = {}, {}, {}

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        super().on_epoch_end(trainer, record)
        self._check_left_out(trainer)

    @override
    def _act(self, trainer: TrainerCore) -> None:
        with trainer.around_evaluation_weights():
            self._left_out = {} if self._frozen else fingerprint_frozen(trainer)
            self._weights = copy_weights(trainer.unwrapped_model, self._left_out)
            self._outside = {place: copy_weights(module) for place, module in trainer.trained_outside.items()}

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        if self.restore and self._weights:
            self._check_left_out(trainer)
            load_weights(trainer.unwrapped_model, self._weights, strict=not self._left_out)
            for place, weights in self._outside.items():
                load_weights(trainer.trained_outside[place], weights)
            for averages in trainer.run.averages().values():
                averages.copy_from(trainer.trained_modules)

    def _check_left_out(self, trainer: TrainerCore) -> None:
        """Raise `ModelError` if a parameter has changed that the copy of the best weights leaves out. A collective."""
        if not self._left_out:
            return
        weights = get_weights(trainer.unwrapped_model)
        now = fingerprint_tensors(trainer, {name: weights.get(name) for name in self._left_out})
        if changed := [name for name, text in self._left_out.items() if now.get(name) != text]:
            raise ModelError(
                f"RestoreBestWeights({self._monitor.name!r}, frozen=False): {list_some(changed)} was frozen when the "
                "best weights were copied, and has changed since. Leave out frozen=False."
            )


def copy_weights(module: nn.Module, left_out: Collection[str] = ()) -> StateDict:
    """Return a copy of a module's `state_dict()` in host memory, without some names."""
    return {name: copy_to_host(value) for name, value in without(get_weights(module), left_out).items()}


def fingerprint_frozen(trainer: TrainerCore) -> dict[str, str]:
    """Return the fingerprints of the parameters that are in no optimizer and require no gradient. A collective."""
    return fingerprint_tensors(trainer, without(parameters_of(trainer.unwrapped_model), find_trained(trainer)))

"""Freezing and unfreezing of parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import field

from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.engines.base import all_parameters
from ptacc.engines.reduction import join_names
from ptacc.errors import ModelError, OptionError
from ptacc.model.freezing import Freezing, check_freeze_options
from ptacc.run.state import StateKey
from ptacc.run.step_result import StepResult
from ptacc.types.outputs import EpochRecord
from ptacc.types.progress import Epochs, Progress, Steps

FREEZING: StateKey[Freezing] = StateKey("freezing", saved=False)


class FreezeMixin(Mixin):
    """Freezes parameters by name, and unfreezes them during the run.

    What is frozen depends on the progress of the run alone, so a resumed run has the same parameters frozen. Batch
    norms whose parameters are all frozen are in eval mode, and keep their running statistics. The optimizer has the
    parameters from the start. It skips those that are frozen, and their learning rate follows the schedule. After the
    run, the parameters stay frozen or not, as they are then.

    Options:
        frozen: Names of parameters or submodules, as in `named_parameters()` and `named_modules()`, in which `*` stands
            for any characters. They are frozen for the whole run, unless `unfreeze_at` names them, too.
        unfreeze_at: Such names, of what is frozen at first, each with the time after which it is trained: `Epochs(2)`
            is after two complete epochs, and `Steps(100)` after 100 steps. If several names fit, the first time
            counts. `gradual_unfreezing` makes such a mapping from a list of blocks.

    Hooks: `on_run_start`, `on_epoch_start`, `on_step_end`, `on_epoch_end`, `on_load`.

    Combines with: everything. `DDPMixin` and `DeepSpeedMixin` can freeze, but not unfreeze, on several processes.

    Source: Howard and Ruder, 2018, https://arxiv.org/abs/1801.06146

    Example:
        >>> from ptacc import Epochs, FreezeMixin, Trainer
        >>> from ptacc.testing import iris_parts
        >>> class FineTuner(FreezeMixin, Trainer):
        ...     pass
        >>> trainer = FineTuner(**iris_parts(), unfreeze_at={"0": Epochs(1)})
    """

    frozen: Sequence[str] = ()
    unfreeze_at: Mapping[str, Epochs | Steps] = field(default_factory=dict)

    @override
    def check_options(self) -> None:
        check_freeze_options(type(self).__name__, self.frozen, self.unfreeze_at)

    @override
    @contextlib.contextmanager
    def _reserved(self) -> Generator[None]:
        """Freeze before the set-up of a run, which checks what is trained and wraps the model."""
        with super()._reserved():
            with self._distributed.synced("freezing"):
                make_freezing(self).set_frozen(Progress())
            yield

    @override
    def _frozen_as_in_run(self) -> contextlib.AbstractContextManager[None]:
        return super()._frozen_as_in_run() if self.is_running else make_freezing(self).applied_at_start()

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        freezing = self.run[FREEZING] = make_freezing(self)  # the engine may have replaced the parameters
        joining, trained = freezing.unfrozen_later, set(all_parameters(self.run.engine.slots))
        if joining and not self.run.engine.can_unfreeze:
            raise OptionError(
                f"{type(self).__name__}(unfreeze_at=...): its engine trains the parameters that are not frozen when "
                "the run begins. Leave DDPMixin and DeepSpeedMixin out; FSDPMixin shards a model, and can unfreeze."
            )
        if missing := [parameter for parameter in joining if parameter not in trained]:
            raise ModelError(
                f"{type(self).__name__}(unfreeze_at=...): no optimizer has {join_names(self.unwrapped_model, missing)}."
                " Create the optimizer with all parameters, also those that are frozen at first."
            )

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        self.run[FREEZING].apply(self.progress)

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        self.run[FREEZING].apply(self.progress)  # before the run is saved

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if step.step in self.run[FREEZING].steps:
            self.run[FREEZING].apply(self.progress)

    @override
    def on_load(self, path: str) -> None:
        super().on_load(path)
        if self.is_running:  # a run resumes
            self.run[FREEZING].apply(self.progress)


def make_freezing(trainer: FreezeMixin) -> Freezing:
    """Find what the options of a trainer name in its model."""
    return Freezing(trainer.unwrapped_model, trainer.frozen, trainer.unfreeze_at, type(trainer).__name__)

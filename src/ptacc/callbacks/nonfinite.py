"""Stop at a loss that is no number."""

from __future__ import annotations

import math

from typing_extensions import override

from ptacc.core.events import Callback
from ptacc.core.history import StepResult
from ptacc.core.hooks import TrainerCore
from ptacc.core.late import LateReader


class StopOnNonFinite(Callback[TrainerCore]):
    """Stops a run whose loss became NaN or infinite: `history.stop_reason` tells the step.

    It looks at the epoch's running sum, which stays non-finite once it is, and reads it without waiting for the
    device: on a GPU the run stops a step late.
    """

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        """Prepare to read from the run's device."""
        self._reader = LateReader(trainer.device)

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        """Read the new epoch's sum from its start."""
        self._reader = LateReader(trainer.device)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        """Look at what has arrived."""
        if not math.isfinite(self._reader.read(trainer.run.epoch.losses.total)):
            trainer.stop(f"non-finite loss at step {step.step}")

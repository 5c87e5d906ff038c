"""Stop at a loss that is no number."""

from __future__ import annotations

import math

from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.core.late import LateReader
from ptacc.run.history import StepResult
from ptacc.types.outputs import EpochRecord, EvalResult


class StopOnNonFinite(Callback[TrainerCore]):
    """Stops a run whose loss became NaN or infinite, in training or in evaluation; `history.stop_reason` tells where.

    It looks at the epoch's running sum, which stays non-finite once it is, and reads it without waiting for the
    device: on a GPU the run stops a step late.
    """

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        """Read the new epoch's sum from its start."""
        self._reader = LateReader(trainer.device)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        """Look at what has arrived."""
        if not math.isfinite(self._reader.read(trainer.run.epoch.losses.total)):
            trainer.stop(f"non-finite loss at step {step.step}")

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        """Look at the loss of an evaluation within the run."""
        if trainer.is_running and not math.isfinite(result.loss):
            which = f"evaluation {name!r}" if name else "evaluation"
            trainer.stop(f"non-finite loss in the {which} after step {trainer.progress.steps}")

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        """Look at the whole epoch, whose last steps had not arrived."""
        if record.items and not math.isfinite(record.train_loss):
            trainer.stop(f"non-finite loss in epoch {record.epoch}")

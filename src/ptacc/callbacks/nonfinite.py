"""Stop a run whose loss becomes NaN or infinite."""

from __future__ import annotations

import math

from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.run.running_loss import RunningLoss
from ptacc.run.step_result import StepResult
from ptacc.types.outputs import EpochRecord, EvalResult


class StopOnNonFinite(Callback[TrainerCore]):
    """Stops a run when a training or evaluation loss becomes NaN or infinite; `history.stop_reason` says where.

    It reads the mean of the epoch's losses so far, which stays non-finite once it is, without synchronising the device:
    on a GPU the run stops one step late.
    """

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        self._losses = RunningLoss(trainer.device)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        self._losses.add(step.loss, step.items)
        if not math.isfinite(self._losses.read() or 0.0):
            trainer.stop(f"non-finite loss at step {step.step}")

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        if trainer.is_running and not math.isfinite(result.loss):
            which = f"evaluation {name!r}" if name else "evaluation"
            trainer.stop(f"non-finite loss in the {which} after step {trainer.progress.steps}")

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        # The losses of the last steps may not have been copied in `on_step_end`.
        if record.items and not math.isfinite(record.train_loss):
            trainer.stop(f"non-finite loss in epoch {record.epoch}")

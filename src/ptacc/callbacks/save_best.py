"""Save a checkpoint whenever a monitored value improves."""

from __future__ import annotations

from typing_extensions import override

from ptacc.core.monitoring import BestValue
from ptacc.types.outputs import EpochRecord
from ptacc.types.protocols import SupportsCheckpoint


class SaveBest(BestValue[SupportsCheckpoint]):
    """Saves a checkpoint whenever a monitored value is the best so far.

    An evaluated value is compared after each evaluation of the run, with the weights that were evaluated; any other
    value, such as `train_loss`, after each complete epoch. Checkpoints are labelled with the name of the value. The
    newest one with that label is never deleted.

    Args:
        monitor: The name of the value, or a `Monitor`.
        mode: Whether a lower or a higher value is better; a `Monitor` has its own mode.

    Attributes:
        best_value: The best value so far, NaN before the first.
        best_epoch: The epoch that reported it, counted from 1; 0 before the first step.
        best_step: The number of steps at that time.
    """

    @override
    def on_epoch_end(self, trainer: SupportsCheckpoint, record: EpochRecord) -> None:
        if record.is_complete:  # a run that ends within an epoch has been saved
            super().on_epoch_end(trainer, record)

    @override
    def _act(self, trainer: SupportsCheckpoint) -> None:
        trainer.save_checkpoint(label=self._monitor.name)

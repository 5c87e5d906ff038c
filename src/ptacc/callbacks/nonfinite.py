"""Stop at a loss that is no number."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.run.history import StepResult
from ptacc.types.outputs import EpochRecord, EvalResult


class AsyncScalarReader:
    """The value of a scalar on the device, as of the last step whose copy has arrived; nobody waits for it."""

    def __init__(self, device: torch.device) -> None:
        """Read from `device`."""
        self._is_on_host = device.type == "cpu"
        self._copied: torch.cuda.Event | None = None
        pin = device.type == "cuda"
        self._host = torch.zeros((), dtype=torch.float64, pin_memory=pin)
        self._view = self._host.numpy()
        self._seen: Tensor | None = None

    def read(self, value: Tensor) -> float:
        """Return the value if it is at hand, or what arrived last, and ask for the present one."""
        if self._is_on_host:
            if self._seen is not value:  # a view costs no operation, making one does
                self._seen, self._view = value, value.numpy()
            return float(self._view)
        if self._copied is None or self._copied.query():  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            arrived = float(self._view)
            self._host.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
            return arrived
        return 0.0


class StopOnNonFinite(Callback[TrainerCore]):
    """Stops a run whose loss became NaN or infinite, in training or in evaluation; `history.stop_reason` tells where.

    It looks at the epoch's running sum, which stays non-finite once it is, and reads it without waiting for the
    device: on a GPU the run stops a step late.
    """

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        """Read the new epoch's sum from its start."""
        self._reader = AsyncScalarReader(trainer.device)

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

"""Stop a run whose loss becomes NaN or infinite."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.run.history import StepResult
from ptacc.tensors.devices import widest_float
from ptacc.types.outputs import EpochRecord, EvalResult


class AsyncScalarReader:
    """Reads a scalar from a device without synchronising: the value may be some steps old."""

    def __init__(self, device: torch.device) -> None:
        self._is_on_host = device.type == "cpu"
        self._module: Any = None if self._is_on_host else torch.get_device_module(device)
        self._copied: Any = None
        self._host = torch.zeros((), dtype=widest_float(device), pin_memory=device.type == "cuda")
        self._view = self._host.numpy()
        self._source: Tensor | None = None

    def read(self, value: Tensor) -> float:
        """Return the last value that was copied to the host, 0 while a copy is running; then start the next copy."""
        if self._is_on_host:
            if self._source is not value:  # reading through a view runs no operation, but creating it does
                self._source, self._view = value, value.numpy()
            return float(self._view)
        if self._copied is None or self._copied.query():
            copied = float(self._view)
            self._host.copy_(value, non_blocking=True)
            self._copied = self._module.Event()
            self._copied.record()
            return copied
        return 0.0


class StopOnNonFinite(Callback[TrainerCore]):
    """Stops a run when a training or evaluation loss becomes NaN or infinite; `history.stop_reason` says where.

    It reads the epoch's running sum of losses, which stays non-finite once it is, without synchronising the device:
    on a GPU the run stops one step late.
    """

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        self._reader = AsyncScalarReader(trainer.device)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if not math.isfinite(self._reader.read(trainer.run.epoch.losses.total)):
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

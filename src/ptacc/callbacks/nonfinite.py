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


class LossSumReader:
    """Sums losses on their device, and reads the sum without synchronising."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), dtype=widest_float(device), device=device)
        self._is_on_host = device.type == "cpu"
        self._host_sum = 0.0
        if not self._is_on_host:
            self._module = torch.get_device_module(device)
            self._copied: Any = None
            self._copy = torch.zeros((), dtype=self._sum.dtype, pin_memory=device.type == "cuda")

    def add(self, loss: Tensor) -> float:
        """Add a scalar. Return the sum, on a device the last one whose copy to the host is complete."""
        if self._is_on_host:
            self._host_sum += loss.item()
            return self._host_sum
        self._sum += loss
        if self._copied is None or self._copied.query():
            self._host_sum = self._copy.item()
            self._copy.copy_(self._sum, non_blocking=True)
            self._copied = self._module.Event()
            self._copied.record()
        return self._host_sum


class StopOnNonFinite(Callback[TrainerCore]):
    """Stops a run when a training or evaluation loss becomes NaN or infinite; `history.stop_reason` says where.

    It reads the epoch's running sum of losses, which stays non-finite once it is, without synchronising the device:
    on a GPU the run stops one step late.
    """

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        self._reader = LossSumReader(trainer.device)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if not math.isfinite(self._reader.add(step.loss)):
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

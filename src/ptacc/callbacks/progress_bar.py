"""Show a progress bar."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TextIO

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from ptacc.console import Bar, is_watched, standard_error
from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.run.running_loss import RunningLoss
from ptacc.run.step_result import StepResult
from ptacc.types.arguments import max_seconds
from ptacc.types.outputs import EvalResult
from ptacc.validation import check_positive

LOSS_STEPS = 20
"""Steps over which the loss is a mean."""
DECAY = 0.9
"""Factor of the weight of earlier items in the speed, at each update of the bar."""


class ProgressBar(Callback[TrainerCore]):
    """Shows a bar for each epoch, evaluation and prediction, in a terminal or a notebook, on rank 0.

    The bar of an epoch shows, as far as they fit: the loss, the remaining time of the epoch and of the run, the items
    per second, and the learning rate. The remaining times include evaluations and checkpoints, as often as the run has
    made them so far.

    The loss is the mean over rank 0's last 20 steps. Reading it does not synchronise a GPU: there, the bar shows the
    loss of the update before.

    Args:
        refresh_seconds: The shortest time between two updates of the bar.
        file: The terminal to write to, by default standard error, or the output of a notebook.
        shown: Whether to show the bar, by default if `file` is a terminal or the output of a notebook.

    Raises:
        OptionError: `refresh_seconds` is not a positive number.
    """

    def __init__(self, *, refresh_seconds: float = 0.1, file: TextIO | None = None, shown: bool | None = None) -> None:
        check_positive("ProgressBar", "refresh_seconds", refresh_seconds)
        self._refresh_seconds, self._file, self._shown = refresh_seconds, file, shown
        self._bar: Bar | None = None
        self._due = 0.0
        self._title, self._eval_started, self._shows_eval = "", 0.0, False

    def _open(self, trainer: TrainerCore) -> None:
        self._close()
        file = self._file or standard_error()
        shown = is_watched(file) if self._shown is None else self._shown
        if file is not None and shown and trainer.distributed.is_main:
            self._bar, self._due = Bar(file), 0.0

    def _close(self, *, is_complete: bool = False) -> None:
        if self._bar is not None:
            self._bar.close(is_complete=is_complete)
            self._bar = None

    # ---- a run

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self._open(trainer)
        self._steps: deque[StepResult] = deque(maxlen=LOSS_STEPS)
        self._losses, self._loss = RunningLoss(trainer.device), ""
        self._items, self._seconds = 0.0, 0.0
        self._measured_at, self._items_before = time.monotonic(), trainer.progress.items
        self._start: tuple[int, float] | None = None  # a number of steps, and the time after them

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        if self._bar is not None and time.monotonic() >= self._due:
            self._show_epoch(self._bar, trainer)

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if self._bar is None:
            return
        self._steps.append(step)
        if time.monotonic() >= self._due:
            self._show_epoch(self._bar, trainer)

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        self._close(is_complete=True)

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        self._close()

    def _show_epoch(self, bar: Bar, trainer: TrainerCore) -> None:
        self._measure(trainer)
        run, progress, plan = trainer.run, trainer.progress, trainer.run.plan
        if self._start is None and self._steps:
            self._start = progress.steps, self._measured_at
        done, in_epoch = run.count_epoch_steps()
        steps_left = None if plan.known_total_steps is None else plan.known_total_steps - progress.steps
        lengths = [in_epoch, None if steps_left is None else done + steps_left]
        total = min((length for length in lengths if length is not None), default=None)
        ends = [self._seconds_for(steps_left, progress.steps)]
        if (limit := max_seconds(run.options)) is not None:
            ends.append(max(limit - run.elapsed, 0.0))
        if plan.item_limit is not None and self._items:
            ends.append(max(plan.item_limit - progress.items, 0.0) * self._seconds / self._items)
        run_left = min((seconds for seconds in ends if seconds is not None), default=None)
        epoch_left = self._seconds_for(None if total is None else total - done, progress.steps)
        of_epochs = "" if plan.known_epochs is None else f"/{plan.known_epochs}"
        bar.show(f"epoch {progress.epochs + 1}{of_epochs}", done, total, self._notes(epoch_left, run_left))
        self._due = self._measured_at + self._refresh_seconds

    def _notes(self, epoch_left: float | None, run_left: float | None) -> list[str]:
        """Return what the bar shows after its counter, the most important first."""
        if self._steps:
            self._losses.reset()
            self._losses.add(torch.stack([step.loss for step in self._steps]).mean(), 1)
            if (mean := self._losses.read()) is not None:
                self._loss = f"loss {mean:.4f}" if abs(mean) >= 0.001 else f"loss {mean:.2e}"
        notes = [self._loss] if self._loss else []
        if epoch_left is not None:
            notes.append(f"{tqdm.format_interval(epoch_left)} left")
        if run_left is not None and run_left != epoch_left:
            notes.append(f"run {tqdm.format_interval(run_left)} left")
        if self._seconds:
            notes.append(f"{tqdm.format_sizeof(self._items / self._seconds)} items/s")
        rate = self._steps[-1].learning_rate if self._steps else math.nan
        if not (isinstance(rate, Tensor) or math.isnan(rate)):  # one may be on the device, and an optimizer have none
            notes.append(f"lr {rate:.3g}")
        return notes

    def _measure(self, trainer: TrainerCore) -> None:
        """Add the items since the last update to the speed."""
        now, items = time.monotonic(), trainer.progress.items
        if items > self._items_before:
            self._items = DECAY * self._items + items - self._items_before
            self._seconds = DECAY * self._seconds + now - self._measured_at
        self._measured_at, self._items_before = now, items

    def _seconds_for(self, steps: int | None, done: int) -> float | None:
        """Return how long a number of steps will take, None if it is unknown."""
        if steps is None or self._start is None or done == self._start[0]:
            return None
        return max(steps, 0) * (self._measured_at - self._start[1]) / (done - self._start[0])

    # ---- evaluations and predictions

    @override
    def on_evaluation_start(self, trainer: TrainerCore, name: str) -> None:
        self._start_eval(trainer, f"evaluating {name}".rstrip())

    @override
    def on_prediction_start(self, trainer: TrainerCore) -> None:
        self._start_eval(trainer, "predicting")

    @override
    def on_eval_progress(self, trainer: TrainerCore, done: int, total: int | None) -> None:
        if self._bar is None:
            return
        now, is_end = time.monotonic(), self._shows_eval and done == total
        if now < self._due and not is_end:
            return
        seconds = (now - self._eval_started) / done
        notes = [] if total is None else [f"{tqdm.format_interval(max(total - done, 0) * seconds)} left"]
        self._bar.show(self._title, done, total, notes)
        self._shows_eval, self._due = True, now + self._refresh_seconds

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        self._end_eval(trainer)

    @override
    def on_prediction_end(self, trainer: TrainerCore) -> None:
        self._end_eval(trainer)

    def _start_eval(self, trainer: TrainerCore, title: str) -> None:
        if trainer.is_running:
            self._measure(trainer)
        else:
            self._open(trainer)
        self._title, self._eval_started, self._shows_eval = title, time.monotonic(), False

    def _end_eval(self, trainer: TrainerCore) -> None:
        self._measured_at = time.monotonic()
        if not trainer.is_running:
            self._close(is_complete=True)

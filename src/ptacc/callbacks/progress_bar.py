"""Show a progress bar."""

from __future__ import annotations

import sys
from typing import NoReturn, TextIO

from tqdm import tqdm
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.run.running_loss import RunningLoss
from ptacc.run.step_result import StepResult
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.validation import check_at_least


class ProgressBar(Callback[TrainerCore]):
    """Shows a bar for each epoch, on rank 0: loss, learning rate, items per second and remaining time.

    The loss is the mean over rank 0's items of the epoch so far. Reading it does not synchronise a GPU: there, the bar
    shows the loss of the update before.

    Args:
        every: Steps between two updates, at least 1.
        file: The file to write to, by default standard error.
        shown: Whether to show the bar, by default if `file` is a terminal.

    Raises:
        OptionError: `every` is less than 1.
    """

    def __init__(self, *, every: int = 10, file: TextIO | None = None, shown: bool | None = None) -> None:
        check_at_least("ProgressBar", "every", every, 1)
        self._every, self._file, self._shown = every, file, shown
        self._bar: tqdm[NoReturn] | None = None
        self._title = ""
        self._loss = "?"
        self._steps_before = 0

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        file = self._file or sys.stderr  # None without a console
        is_terminal = getattr(file, "isatty", lambda: False)
        shown = file is not None and (is_terminal() if self._shown is None else self._shown)
        if shown and trainer.distributed.rank == 0:
            plan = trainer.run.plan
            of_epochs = f"/{plan.known_epochs}" if plan.known_epochs is not None else ""
            self._title = f"epoch {trainer.progress.epochs + 1}{of_epochs}"
            self._steps_before = trainer.progress.steps
            self._losses, self._loss = RunningLoss(trainer.device), "?"
            self._bar = tqdm(
                total=plan.known_steps_per_epoch,
                desc=self._title,
                unit="step",
                file=file,
                leave=False,
                dynamic_ncols=True,
            )

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        bar = self._bar
        if bar is None:
            return
        self._losses.add(step.loss, step.items)
        if step.step % self._every:
            return
        seconds = max(bar.format_dict["elapsed"], 1e-9)
        if (mean := self._losses.read()) is not None:
            self._loss = f"{mean:.4f}"
        bar.set_postfix(
            loss=self._loss,
            lr=f"{float(step.learning_rate):.2e}",
            items=f"{self._losses.items / seconds:.0f}/s",
            refresh=False,
        )
        bar.update(step.step - self._steps_before - bar.n)

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        self._close()

    @override
    def on_evaluation_start(self, trainer: TrainerCore, name: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f"evaluating {name}".rstrip())

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        if self._bar is not None:
            self._bar.set_description_str(self._title)

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""A progress bar."""

from __future__ import annotations

import sys
from typing import NoReturn, TextIO

from tqdm import tqdm
from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.run.history import StepResult
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.validation import check_at_least


class ProgressBar(Callback[TrainerCore]):
    """Shows a bar for each epoch: loss, learning rate, items a second, time left. Rank 0 alone, and in a terminal only.

    The loss is the mean over the epoch so far of this process's part, read from the device each `every` steps.
    """

    def __init__(self, *, every: int = 10, file: TextIO | None = None, shown: bool | None = None) -> None:
        """Make a bar.

        Args:
            every: Steps between two updates, at least 1.
            file: Where to write; standard error if not given.
            shown: Whether to show it; if not given, where `file` is a terminal.

        Raises:
            OptionError: `every` is below 1.
        """
        check_at_least("ProgressBar", "every", every, 1)
        self._every, self._file, self._shown = every, file, shown
        self._bar: tqdm[NoReturn] | None = None
        self._title = ""
        self._steps_before = 0

    @override
    def on_epoch_start(self, trainer: TrainerCore) -> None:
        """Open the epoch's bar."""
        file = self._file or sys.stderr
        shown = file.isatty() if self._shown is None else self._shown
        if shown and trainer.distributed.rank == 0:
            plan = trainer.run.plan
            of_epochs = f"/{plan.known_epochs}" if plan.known_epochs is not None else ""
            self._title = f"epoch {trainer.progress.epochs + 1}{of_epochs}"
            self._steps_before = trainer.progress.steps
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
        """Move on, and show what is known each `every` steps."""
        if self._bar is None or step.step % self._every:
            return
        losses, bar = trainer.run.epoch.losses, self._bar
        seconds = max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix(
            loss=f"{float(losses.total) / losses.items:.4f}",
            lr=f"{float(step.learning_rate):.2e}",
            items=f"{losses.items / seconds:.0f}/s",
            refresh=False,
        )
        bar.update(step.step - self._steps_before - bar.n)

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        """Close the epoch's bar."""
        self._close()

    @override
    def on_evaluation_start(self, trainer: TrainerCore, name: str) -> None:
        """Say that an evaluation is under way."""
        if self._bar is not None:
            self._bar.set_description_str(f"evaluating {name}".rstrip())

    @override
    def on_evaluation_end(self, trainer: TrainerCore, name: str, result: EvalResult) -> None:
        """Say that the epoch goes on."""
        if self._bar is not None:
            self._bar.set_description_str(self._title)

    @override
    def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
        """Leave the terminal as it should be."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""Print a table of epochs."""

from __future__ import annotations

from typing import TextIO

from typing_extensions import override

from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.types.outputs import EpochRecord

WIDTH = 10


class PrintMetrics(Callback[TrainerCore]):
    """Prints a row for each epoch, on rank 0: the epoch, the step, every reported value, and the seconds.

    Args:
        file: The file to print to, by default standard output.
    """

    def __init__(self, *, file: TextIO | None = None) -> None:
        self._file = file
        self._columns: list[str] = []

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self._columns = []

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        if trainer.distributed.rank != 0:
            return
        values = record.values()
        if not values.keys() <= set(self._columns):  # print a new header
            self._columns = list(dict.fromkeys([*self._columns, *values]))
            self._print(["epoch", "step", *self._columns, "seconds"])
        row = [format_number(values[name], name) if name in values else "" for name in self._columns]
        self._print([str(record.epoch), str(record.step), *row, f"{record.seconds:.2f}"])

    @override
    def on_run_end(self, trainer: TrainerCore) -> None:
        if trainer.history.stop_reason is not None and trainer.distributed.rank == 0:
            print(f"stopped after step {trainer.progress.steps}: {trainer.history.stop_reason}", file=self._file)

    def _print(self, cells: list[str]) -> None:
        names = ["epoch", "step", *self._columns, "seconds"]
        widths = [max(len(name), WIDTH if name in self._columns else 5) for name in names]
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)), file=self._file)


def format_number(value: float, name: str = "") -> str:
    """Return a value with five significant digits, a learning rate with three.

    Example:
        >>> format_number(0.123456), format_number(0.123456, "learning_rate")
        ('0.12346', '0.123')
    """
    return f"{value:.3g}" if name == "learning_rate" else f"{value:.5g}"

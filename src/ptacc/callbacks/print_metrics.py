"""Print a table of the values of a run."""

from __future__ import annotations

import math
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TextIO, TypeAlias, get_args

from typing_extensions import override

from ptacc.console import COLUMNS, count_columns, is_watched, write_line
from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore
from ptacc.display.numbers import format_value
from ptacc.types.outputs import EpochRecord
from ptacc.validation import check_choice

Rows: TypeAlias = Literal["epoch", "evaluation", "report"]

WIDTH = 10
"""The least width of the column of a value."""
EPOCH, STEP, SECONDS = 5, 7, 7
"""Widths of the other columns."""
HEADER_EVERY = 40
"""Rows between two headers."""
LOG_SECONDS = 10.0
"""The shortest time, in seconds, between a row and that of a report in a log file, if `every` is not given."""


class PrintMetrics(Callback[TrainerCore]):
    """Prints rows of values, on rank 0: the epoch, the step, every value, and the seconds since the start of the epoch.

    The row of an epoch has the means over the epoch. Other rows have the values since the last report: see
    `Callback.on_values`. In a terminal, columns that are too wide for it are printed below the row, on a line for each
    evaluation set.

    Args:
        every: `"epoch"` prints a row for each epoch, `"evaluation"` also one for each evaluation within an epoch, and
            `"report"` also one for each report in between, as often as `log_every` says. By default, rows are those of
            `"evaluation"`; a log file has a row for a report, too, if there was none for 10 seconds.
        file: The file to print to, by default standard output.

    Raises:
        OptionError: `every` has another value.
    """

    def __init__(self, *, every: Rows | None = None, file: TextIO | None = None) -> None:
        check_choice("PrintMetrics", "every", every, get_args(Rows), "the default")
        self._every, self._given_file = every, file

    @property
    def _file(self) -> TextIO | None:
        return self._given_file or sys.stdout  # None without a console

    @override
    def on_run_start(self, trainer: TrainerCore) -> None:
        self._columns: list[str] = []
        self._sets: dict[str, str] = {}  # the evaluation set of each value
        self._header, self._rows, self._last_step, self._last_time = "", 0, -1, time.monotonic()

    @override
    def on_epoch_end(self, trainer: TrainerCore, record: EpochRecord) -> None:
        self._print(trainer, record.epoch, record.step, record.seconds, record.values())

    @override
    def on_values(self, trainer: TrainerCore, values: Mapping[str, float], step: int) -> None:
        run = trainer.run
        # The row of an epoch has been printed, or follows at the end of the run.
        if step != self._last_step and not (run.is_done() and run.is_within_epoch) and self._is_due(trainer, step):
            shown = {name: value for name, value in values.items() if name != "epoch" and not is_repeated(name, values)}
            self._print(trainer, int(values["epoch"]), step, time.monotonic() - run.epoch.started, shown)

    def _is_due(self, trainer: TrainerCore, step: int) -> bool:
        evaluations = trainer.history.evaluations
        if self._every == "report" or (self._every != "epoch" and evaluations and evaluations[-1].step == step):
            return True
        is_late = time.monotonic() - self._last_time >= LOG_SECONDS
        return self._every is None and is_late and not is_watched(self._file)

    def _print(self, trainer: TrainerCore, epoch: int, step: int, seconds: float, values: Mapping[str, float]) -> None:
        self._last_step, self._last_time = step, time.monotonic()
        if trainer.distributed.rank != 0:
            return
        if not values.keys() <= set(self._columns):
            self._columns = list(dict.fromkeys([*values, *self._columns]))
        file, columns = self._file, count_columns(self._file)
        for name, result in trainer.run.epoch.evaluations.items():
            self._sets |= dict.fromkeys(result.values(name), name)
        table, below = arrange(self._columns, self._sets, columns)
        widths = [EPOCH, STEP, *map(column_width, table), SECONDS]
        header = join_cells(["epoch", "step", *table, "seconds"], widths)
        if header != self._header or self._rows == HEADER_EVERY:
            write_line(header, file)
            self._header, self._rows = header, 0
        cells = {name: format_number(value, name) for name, value in values.items()}
        row = [str(epoch), str(step), *(cells.get(name, "") for name in table), f"{seconds:.2f}"]
        write_line(join_cells(row, widths), file)
        for group in below:
            if pairs := [f"{name}={cells[name]}" for name in group if name in cells]:
                write_line(join_pairs(pairs, columns or COLUMNS), file)
        self._rows += 1


def is_repeated(name: str, values: Mapping[str, float]) -> bool:
    """Return whether a value is the learning rate of one of several groups, and that of the first group."""
    return name.endswith("/learning_rate") and values[name] == values.get("learning_rate")


def arrange(names: Sequence[str], sets: Mapping[str, str], columns: int | None) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a table, and those that are printed below it because it is too wide, in groups.

    Args:
        names: Names of the values.
        sets: The evaluation set of each value that an evaluation reported.
        columns: Width of the terminal; None if lines may be of any length.

    Example:
        >>> arrange(["train_loss", "eval_loss", "accuracy"], {"eval_loss": "", "accuracy": ""}, 50)
        (['train_loss'], [['eval_loss', 'accuracy']])
    """
    room = math.inf if columns is None else columns - (EPOCH + 2 + STEP + 2 + SECONDS)
    if sum(2 + column_width(name) for name in names) <= room:
        return list(names), []
    own, table = [name for name in names if name not in sets], []
    while own and (room := room - 2 - column_width(own[0])) >= 0:
        table.append(own.pop(0))
    by_set = ([name for name in names if sets.get(name) == one] for one in dict.fromkeys(sets.values()))
    return table, [group for group in (own, *by_set) if group]


def column_width(name: str) -> int:
    """Return the width of a column of values."""
    return max(len(name), WIDTH)


def join_pairs(pairs: Sequence[str], columns: int) -> str:
    """Return indented lines with as many of the pairs as fit."""
    indent = " " * (EPOCH + 2)
    return textwrap.fill(
        "  ".join(pairs), columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def join_cells(cells: Iterable[str], widths: Iterable[int]) -> str:
    """Return a line with cells of these widths."""
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def format_number(value: float, name: str) -> str:
    """Return a value as text, a learning rate with three significant digits.

    Example:
        >>> format_number(0.123456, "eval_loss"), format_number(0.123456, "learning_rate")
        ('0.12346', '0.123')
    """
    return f"{value:.3g}" if name.startswith("learning_rate") else format_value(value)

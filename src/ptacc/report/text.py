"""How values of a run are written, in the page and in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from ptacc.display.numbers import format_value
from ptacc.report.run_files import RecordedRun

UNKNOWN = "-"


def format_values(values: Iterable[tuple[str, float]]) -> str:
    """Return values with their names."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in values) or UNKNOWN


def format_steps(run: RecordedRun) -> str:
    """Return the steps of a run, and how many it was planned to make."""
    return f"{run.step:,}" + ("" if run.planned is None else f" of {run.planned:,}")


def format_best(run: RecordedRun) -> str:
    """Return the best value of a run, with its step."""
    return UNKNOWN if run.best is None else f"{run.best[0]} {format_value(run.best[2])} @ {run.best[1]:,}"


def format_time(time: datetime | None) -> str:
    """Return a time in UTC, in minutes."""
    return UNKNOWN if time is None else f"{time:%Y-%m-%d %H:%M} UTC"


def format_duration(seconds: float | None) -> str:
    """Return a duration.

    Example:
        >>> format_duration(93784.2), format_duration(0.04)
        ('1 day, 2:03:04', '0:00:00')
    """
    return UNKNOWN if seconds is None else str(timedelta(seconds=int(seconds)))


def printable(text: str) -> str:
    """Return a text in one line and without control characters of the terminal."""
    return text if text.isprintable() else repr(text)

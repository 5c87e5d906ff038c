"""Finds runs, and lists them as rows of a table and as JSON."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ptacc.display.tables import align
from ptacc.errors import OptionError
from ptacc.report.run_files import RecordedRun, is_history, read_run
from ptacc.report.text import format_best, format_duration, format_steps, format_time, format_values, printable
from ptacc.storage.store import MANIFEST, PREFIX

MAX_STATUS = 50
"""Characters of a status in a table."""
HEAD = ("path", "status", "step", "best", "last", "started", "duration")


def find_runs(path: Path) -> list[Path]:
    """Return the runs that a path is, for `read_run`: history files, or directories of checkpoints without one.

    Raises:
        OptionError: The path has no run.
    """
    if not path.is_dir():
        return [path]
    if found := runs_in(path):
        return found
    below = find_runs_below(path)
    hint = f" Name one of its runs: {', '.join(map(str, below[:3]))}." if below else ""
    raise OptionError(f"{path} has neither a history file nor checkpoints.{hint}")


def find_runs_below(directory: Path) -> list[Path]:
    """Return the runs in a directory and in all directories below it."""
    found: list[Path] = []
    for folder, names, _ in os.walk(directory):
        names[:] = sorted(name for name in names if not name.startswith((".", PREFIX)))
        found += runs_in(Path(folder))
    return list(dict.fromkeys(found))  # without history files, later runs are found twice


def runs_in(directory: Path) -> list[Path]:
    """Return the history files in a directory, or without any its directories of checkpoints. Later runs are last."""
    histories = sorted((path for path in directory.glob("*.jsonl") if is_history(path)), key=by_number)
    if histories:
        return histories
    later = sorted(directory.glob("run-*"), key=by_number)
    return [path for path in (directory, *later) if any(path.glob(f"{PREFIX}*/{MANIFEST}"))]


def by_number(path: Path) -> tuple[str, int]:
    """Return a key that sorts `x`, `x-run-2`, `x-run-10`."""
    name, _, number = path.stem.rpartition("run-")
    return (name.removesuffix("-"), int(number)) if number.isdecimal() else (path.stem, 1)


# ---- listing runs


def list_runs(directory: Path) -> tuple[list[RecordedRun], list[str]]:
    """Return the runs below a directory, and what is wrong with those that cannot be read."""
    runs: list[RecordedRun] = []
    problems: list[str] = []
    for path in find_runs_below(directory):
        try:
            runs.append(read_run(path, with_steps=False))
        except OptionError as error:
            problems.append(str(error))
    # A run with a history file elsewhere is listed once.
    with_history = {run.checkpoint_dir for run in runs if run.attempts}
    return [run for run in runs if run.attempts or run.checkpoint_dir not in with_history], problems


def format_table(runs: Sequence[RecordedRun]) -> list[str]:
    """Return the lines of a table of runs."""
    rows = [
        (
            run.title,
            run.status if len(run.status) <= MAX_STATUS else f"{run.status[: MAX_STATUS - 3]}...",
            format_steps(run),
            format_best(run),
            format_values(last_values(run).items()),
            format_time(run.started),
            format_duration(run.seconds),
        )
        for run in runs
    ]
    return align([[printable(cell) for cell in row] for row in (HEAD, *rows)], right=[HEAD.index("step")])


def last_values(run: RecordedRun) -> dict[str, float]:
    """Return the last loss, and the last values of evaluations, by name."""
    names = [name for name in ("train_loss", *run.evaluated) if name in run.values]
    return {name: run.values[name][max(run.values[name])] for name in names}


def as_json(run: RecordedRun) -> dict[str, object]:
    """Return a run as JSON. Infinity and NaN, which JSON does not have, become strings."""
    best = None if run.best is None else {"name": run.best[0], "step": run.best[1], "value": finite(run.best[2])}
    return {
        "path": str(run.path),
        "status": run.status,
        "step": run.step,
        "planned": run.planned,
        "epoch": run.epoch,
        "best": best,
        "last": {name: finite(value) for name, value in last_values(run).items()},
        "started": None if run.started is None else run.started.isoformat(),
        "seconds": run.seconds,
        "resumed": max(len(run.attempts) - 1, 0),
    }


def finite(value: float) -> float | str:
    """Return a value that JSON has."""
    return value if math.isfinite(value) else repr(value)

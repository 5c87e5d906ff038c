"""Trackers that write files and need nothing installed: JSON lines and CSV."""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from typing_extensions import override

from ptacc.run.history_file import to_json
from ptacc.tracking.tracker import ConfigValue, TrackedRun
from ptacc.validation import absolute_path


class FileTracker(ABC):
    """Writes a file for each run, and its configuration to `<stem>.config.json`.

    A run never overwrites the file of another: if `metrics.csv` exists, a new run writes `metrics-run-2.csv`. A resumed
    run continues its file, and first removes the reports after its checkpoint.

    Args:
        path: The file. Its directory is created with it.

    Raises:
        OptionError: The path is not a local one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        advice = "Remote stores cannot append lines to a file."
        self._path = self._file = absolute_path(type(self).__name__, "path", path, advice)

    @property
    def name(self) -> str:
        """The name of the file."""
        return self._path.name

    def start(self, config: Mapping[str, ConfigValue], resume: TrackedRun | None) -> str:
        """Create a file, or remove the reports after the checkpoint from the file of the run."""
        if resume is None:
            self._file = create_unused(self._path)
            self._file.with_suffix(".config.json").write_text(to_json(config) + "\n", encoding="utf-8")
        else:
            self._file = self._path.with_name(resume.id)
        self._keep(0 if resume is None else resume.reports)
        return self._file.name

    @abstractmethod
    def _keep(self, reports: int) -> None:
        """Keep the first reports of the file, and remove the others."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Append the values of a report."""

    def finish(self, exit_code: int) -> None:
        """Close the file."""


class JSONLinesTracker(FileTracker):
    """Writes a line of JSON for each report: `{"step": 50, "epoch": 1, "train_loss": 0.51, ...}`.

    NaN is null, and an infinity is 1e999. See `FileTracker` for the arguments.
    """

    _stream: TextIO | None = None

    @override
    def _keep(self, reports: int) -> None:
        with self._file.open("rb+") as file:
            file.truncate(sum(map(len, itertools.islice(file, reports))))

    @override
    def log(self, values: Mapping[str, float], step: int) -> None:
        if self._stream is None:
            self._stream = self._file.open("a", encoding="utf-8")
        self._stream.write(to_json({"step": step, **values}) + "\n")
        self._stream.flush()  # a killed process leaves every line

    @override
    def finish(self, exit_code: int) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class CSVTracker(FileTracker):
    """Writes a row for each report, below a header with the names of the values.

    If a report has a value with a new name, the file is written again with a column for it. See `FileTracker` for the
    arguments.
    """

    _columns: list[str]

    @override
    def _keep(self, reports: int) -> None:
        rows = self._read()
        self._columns = list(rows[0]) if rows else ["step"]
        self._write(rows[:reports])

    @override
    def log(self, values: Mapping[str, float], step: int) -> None:
        row = {"step": str(step)} | {name: repr(value) for name, value in values.items()}
        if new := [name for name in row if name not in self._columns]:
            rows, self._columns = self._read(), [*self._columns, *new]
            self._write([*rows, row])
            return
        with self._file.open("a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _read(self) -> list[dict[str, str]]:
        with self._file.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Replace the file at once, so that a killed process leaves the old one or the new one."""
        new = self._file.with_name(f"{self._file.name}.new")
        with new.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        new.replace(self._file)


def create_unused(path: Path, *, is_directory: bool = False) -> Path:
    """Create a file or a directory at `path`, or if it exists, at `<stem>-run-2<suffix>` and so on. Return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, unused = 1, path
    while True:
        with contextlib.suppress(FileExistsError):
            unused.mkdir() if is_directory else unused.touch(exist_ok=False)
            return unused
        number += 1
        unused = path.with_stem(f"{path.stem}-run-{number}")

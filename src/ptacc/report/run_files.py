"""A run as its own files describe it: the lines of its history, and the manifests of its checkpoints."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

from ptacc.checkpoint.catalog import CheckpointEntry, list_run
from ptacc.errors import OptionError, PtaccError
from ptacc.files.paths import is_url
from ptacc.run.history_file import HEADER
from ptacc.storage.manifest import is_count
from ptacc.storage.remote_store import open_store
from ptacc.types.monitor import Monitor
from ptacc.types.outputs import EvalResult

Line: TypeAlias = Mapping[str, Any]

INVALID = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
"""What reading an invalid line raises."""
PROCESS = re.compile(r"[1-9][0-9]{0,8}")
"""The number of a process. 0 and larger numbers mean something else to the system."""
STEP_LINE = b'{"kind": "step"'
"""How the line of a single step begins."""


@dataclass
class Attempt:
    """One execution of a run: from its start or a resumption to its end. What the file does not say is None.

    Args:
        started: When it started.
        first_step: Steps of the run before it.
        seconds: Duration of the run before it; at its end, with it.
        planned: Steps that the whole run was planned to make.
        options: The text of each option, and its origin.
        arguments: The text of each argument of `train()`.
        outcome: How it ended; None if the file does not say it.
    """

    started: datetime | None
    first_step: int
    seconds: float
    planned: int | None
    trainer: dict[str, str]
    options: dict[str, tuple[str, str]]
    arguments: dict[str, str]
    environment: dict[str, str]
    monitors: list[Monitor]
    checkpoints: str | None
    ended: datetime | None = None
    outcome: str | None = None

    @classmethod
    def parse(cls, line: Line) -> Attempt:
        """Parse the first line of a file, or one of the kind `resumed`."""
        planned, model, seed = (line.get(name) for name in ("known_total_steps", "model", "seed"))
        trainer = {"trainer": line.get("trainer"), "model": model, "parameters": line.get("parameters"), "seed": seed}
        return cls(
            started=None if line.get("time") is None else parse_time(line["time"]),
            first_step=check_count(line.get("step", 0)),
            seconds=float(line.get("seconds", 0.0)),
            planned=None if planned is None else check_count(planned),
            trainer={name: str(value) for name, value in trainer.items() if value is not None},
            options={name: (str(text), str(origin)) for name, (text, origin) in line.get("options", {}).items()},
            arguments={name: str(text) for name, text in line.get("arguments", {}).items()},
            environment={name: str(text) for name, text in line.get("environment", {}).items()},
            monitors=[Monitor(str(name), mode) for name, mode in line.get("monitors", [])],
            checkpoints=None if line.get("checkpoints") is None else str(line["checkpoints"]),
        )

    def settings(self) -> dict[str, tuple[str, str]]:
        """Return options and arguments of `train()` by name: the text of each, and its origin."""
        return {**self.options, **{name: (text, "argument of train()") for name, text in self.arguments.items()}}

    @property
    def status(self) -> str:
        """How it ended. Without a line about its end: whether its process runs, which only its own host can tell."""
        if self.outcome is not None:
            return self.outcome
        host, process = self.environment.get("host"), self.environment.get("process", "")
        if host != platform.node() or not PROCESS.fullmatch(process) or sys.platform == "win32":
            return "unknown: killed, or still running"
        return f"running: process {process}" if is_process(int(process)) else "killed"

    def end(self, line: Line) -> None:
        """Add the line of the kind `end`."""
        self.ended, self.seconds = parse_time(line["time"]), float(line["seconds"])
        if line["error"] is not None:
            self.outcome = f"failed: {line['error']}"
        else:
            self.outcome = "complete" if line["reason"] is None else f"stopped: {line['reason']}"


@dataclass
class RecordedRun:
    """A run that was read from its files.

    Args:
        path: Its history file; the directory of its checkpoints if it has none.
        values: Every reported value, by name and step. NaN stands for null.
        evaluated: Names of the values that evaluations reported, in the order of their first report.
        step_losses: The loss of each step.
        step: Steps made.
        epoch: Number of the last epoch.
        problems: What could not be read.
        written: When the history file was last written.
    """

    path: Path
    attempts: list[Attempt] = field(default_factory=list)
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    evaluated: list[str] = field(default_factory=list)
    step_losses: dict[int, float] = field(default_factory=dict)
    step: int = 0
    epoch: int = 0
    checkpoints: list[CheckpointEntry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    written: datetime | None = None

    @property
    def title(self) -> str:
        """The directory of the run; the path without suffix of a history file that has a name of its own."""
        path = self.path.parent if self.path.name == "history.jsonl" else self.path
        return str(path.with_suffix("") if path.suffix == ".jsonl" else path) if path.name else path.resolve().name

    @property
    def checkpoint_dir(self) -> str | None:
        """The path or URL of its checkpoints; None if it has none."""
        if not self.attempts:
            return str(self.path.resolve())
        location = self.attempts[0].checkpoints
        if location is None or is_url(location):
            return location
        return str((self.path.parent / location).resolve())

    @property
    def started(self) -> datetime | None:
        """When it started; None if that is unknown."""
        return self.attempts[0].started if self.attempts else None

    @property
    def status(self) -> str:
        """How its last attempt ended."""
        return self.attempts[-1].status if self.attempts else "unknown: no history file"

    @property
    def planned(self) -> int | None:
        """Steps that it was planned to make; None if that is unknown."""
        return self.attempts[-1].planned if self.attempts else None

    @property
    def seconds(self) -> float | None:
        """Duration, without the times between attempts and what a resumption repeated; None if it is unknown."""
        if not self.attempts:
            return None
        last = self.attempts[-1]
        if last.ended is not None or last.started is None or self.written is None:
            return last.seconds
        return last.seconds + max((self.written - last.started).total_seconds(), 0.0)

    @property
    def best(self) -> tuple[str, int, float] | None:
        """The best of the first value that the run monitors, or of its loss: the name, the step and the value."""
        monitors = self.attempts[-1].monitors if self.attempts else []
        losses = [Monitor(name) for name in (*self.evaluated, "train_loss") if name.endswith("loss")]
        for monitor in (*monitors, *losses):
            points = [(step, v) for step, v in self.values.get(monitor.name, {}).items() if not math.isnan(v)]
            if points:
                choose = min if monitor.mode == "min" else max
                return monitor.name, *choose(points, key=lambda point: point[1])
        return None

    def add_values(self, step: int, values: Mapping[str, float | None], *, is_evaluation: bool = False) -> None:
        """Add values that were reported at a step."""
        for name, value in values.items():
            if is_evaluation and name not in self.evaluated:
                self.evaluated.append(name)
            self.values.setdefault(name, {})[step] = as_float(value)

    def add_line(self, line: Line) -> None:
        """Add a line of the history file."""
        step = check_count(line.get("step", 0))
        match line["kind"]:
            case "run" | "resumed":
                if self.attempts and self.attempts[-1].outcome is None:
                    self.attempts[-1].outcome = "killed"
                self.attempts.append(Attempt.parse(line))
                self.step = step  # what the attempt before did after its last checkpoint is repeated
            case "end":
                self.attempts[-1].end(line)
            case "values":
                self.add_values(step, {name: value for name, value in line["values"].items() if name != "epoch"})
            case "evaluation":
                values = EvalResult(line["loss"], line["metrics"]).values(line["name"])
                self.add_values(step, values, is_evaluation=True)
            case "step":
                self.step_losses[step] = as_float(line["loss"])
        self.step, self.epoch = max(self.step, step), max(self.epoch, check_count(line.get("epoch", 0)))


def parse_time(text: str) -> datetime:
    """Parse the time of a line."""
    return datetime.fromisoformat(text).astimezone(UTC)


def as_float(value: float | None) -> float:
    """Return a value of a line as a float: JSON has null for NaN."""
    return math.nan if value is None else float(value)


def check_count(value: Any) -> int:
    """Return a number of steps or epochs, if it is one."""
    if not is_count(value):
        raise ValueError(f"{value!r} is not a number of steps or epochs")
    return int(value)


# ---- reading


def read_run(path: Path, *, with_steps: bool = True) -> RecordedRun:
    """Read a run from its history file, or the directory of its checkpoints. Most lines are those of single steps.

    Raises:
        OptionError: The file is not a history file, or is damaged.
    """
    run = RecordedRun(path)
    if path.is_dir():
        add_checkpoints(run)
        for manifest in (entry.manifest for entry in run.checkpoints):
            if manifest is not None:
                run.add_values(manifest.step, manifest.metrics, is_evaluation=True)
                run.step, run.epoch = max(run.step, manifest.step), max(run.epoch, manifest.epoch)
        return run
    if not is_history(path):
        raise OptionError(f"{path} is not a history file: its first line is not that of a run of ptacc.")
    for number, text in enumerate(read_whole_lines(path), start=1):
        if with_steps or not text.startswith(STEP_LINE):
            try:
                run.add_line(json.loads(text))
            except INVALID as error:
                raise OptionError(f"{path} is damaged: line {number} cannot be read ({error}).") from error
    run.written = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    add_checkpoints(run)
    return run


def is_history(path: Path) -> bool:
    """Return whether a file begins as the history of a run does."""
    if path.is_dir():
        return False
    with path.open("rb") as file:
        return file.read(len(HEADER)) == HEADER


def is_process(pid: int) -> bool:
    """Return whether a process with this number runs on this host."""
    try:
        os.kill(pid, 0)  # signal 0 only checks
    except PermissionError:
        return True  # of another user
    except ProcessLookupError:
        return False
    return True


def read_whole_lines(path: Path) -> Iterator[bytes]:
    """Read the lines of a file. The last one is left out if it is incomplete: a run writes it, or was killed then."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def add_checkpoints(run: RecordedRun) -> None:
    """Add the checkpoints of a run."""
    if (directory := run.checkpoint_dir) is None:
        return
    try:
        entries = list_run(open_store(directory), "")
    except (PtaccError, OSError) as error:
        run.problems.append(f"The checkpoints in {directory} cannot be read: {error}")
        return
    run.checkpoints = [entry for entry in entries if entry.manifest is not None]
    run.problems += [f"{entry.title}: {entry.problem}" for entry in entries if entry.manifest is None]

"""The history of a run: what its steps, evaluations and epochs reported."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor
from typing_extensions import override

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.run.display import history_html
from ptacc.run.history_file import HistoryFile, to_json
from ptacc.run.step_result import NO_LOSS, LoggedValues, StepMeans, StepResult, add_sums, means, read_results
from ptacc.types.outputs import EpochRecord, EvalResult, EvaluationRecord, StepRecord, ValuesRecord
from ptacc.types.progress import RunPlan
from ptacc.validation import with_install_note

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STEPS_IN_MEMORY = 1000
VALUES_IN_MEMORY = 1000
RECENT_VALUES = 100
"""Reports in memory that are complete. A tracker may have lost them when its process was killed."""
MAX_ERROR = 500
"""Characters of an error in the file."""
STEP_FIELDS = attrgetter(*(field.name for field in fields(StepRecord)))


class RunHistory(Sequence[EpochRecord]):
    """What a run reported: a sequence of its epochs, with its evaluations and the values that it reported within them.

    Args:
        file: A file to which every record is appended as a JSON line. It keeps what memory drops.

    Attributes:
        stop_reason: Why the run stopped before its planned end; None if it did not.
        initial: Results of the evaluations before the first step, by the name of the set.
        evaluations: Every evaluation of the run, in order, also those within epochs.
        step_names: Names of the values that `train_step` logged.
        description: What the file says of the trainer and where it runs, in values that JSON has.

    Example:
        >>> history = RunHistory()
        >>> history.add_epoch(EpochRecord(epoch=1, step=10, train_loss=0.5, items=320, seconds=1.0, learning_rate=0.1))
        >>> history[-1].train_loss
        0.5
        >>> history.to_dict()["train_loss"]
        [0.5]
    """

    def __init__(self, file: HistoryFile | None = None) -> None:
        self.stop_reason: str | None = None
        self.initial: dict[str, EvalResult] = {}
        self.evaluations: list[EvaluationRecord] = []
        self._epochs: list[EpochRecord] = []
        self._values: list[ValuesRecord] = []
        self._steps: deque[StepRecord] = deque(maxlen=STEPS_IN_MEMORY)
        self._unread: list[StepResult] = []
        self._unwritten: list[EvaluationRecord] = []
        self._unread_values = LoggedValues()
        self._of_epoch, self._since_report = StepMeans(), StepMeans()
        self.step_names: set[str] = set()
        self.description: Mapping[str, Any] = {}
        self._file = file
        self._opening: list[tuple[str, Mapping[str, Any]]] = []

    @overload
    def __getitem__(self, index: int) -> EpochRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EpochRecord]: ...
    @override
    def __getitem__(self, index: int | slice) -> EpochRecord | Sequence[EpochRecord]:
        return self._epochs[index]

    @override
    def __len__(self) -> int:
        return len(self._epochs)

    @override
    def __iter__(self) -> Iterator[EpochRecord]:
        return iter(self._epochs)

    @property
    def steps(self) -> Sequence[StepRecord]:
        """The last 1,000 steps whose values were read from the device. At the end of an epoch that is each step."""
        return tuple(self._steps)

    @property
    def values(self) -> Sequence[ValuesRecord]:
        """The values of the run's reports, as in `Callback.on_values`.

        Memory holds at most 1,000 reports. When it is full, about half of them are dropped, and the rest still cover
        the whole run evenly.
        """
        return tuple(self._values)

    def begin(self, seed: int, plan: RunPlan) -> None:
        """Write the first line of a new file."""
        checkpoints = None if self._file is None else self._file.checkpoints
        header = {"seed": seed, **asdict(plan), "checkpoints": checkpoints, "time": utc_now(), **self.description}
        self._write([("run", header)])

    def resume(self, step: int, seconds: float, plan: RunPlan) -> None:
        """Write that the run was resumed, together with what it does first: a complete run does nothing.

        Args:
            step: Steps of the run so far.
            seconds: Duration of the run so far.
            plan: Length of the run.
        """
        resumed = {"step": step, "seconds": seconds, **asdict(plan), "time": utc_now(), **self.description}
        self._opening = [("resumed", resumed)] if self._file is not None else []

    def end(self, step: int, seconds: float, error: BaseException | None = None) -> None:
        """Write how the run ended, unless it was resumed and did nothing.

        Args:
            step: Steps of the run.
            seconds: Duration of the run.
            error: The exception that ended it.
        """
        if self._opening:
            return
        first_line = f"{type(error).__name__}: {error}".partition("\n")[0].removesuffix(": ")
        text = None if error is None else first_line[:MAX_ERROR]
        end = {"step": step, "seconds": seconds, "time": utc_now(), "reason": self.stop_reason, "error": text}
        try:
            self._write([("end", end)])
        except OSError:
            if error is None:
                raise  # else the error is of more use than that of a full disk

    def add_step(self, result: StepResult, distributed: DistributedRuntime) -> None:
        """Add a step, whose values are read later. Every 1,000 steps, read the values of the steps before it."""
        if len(self._unread) >= STEPS_IN_MEMORY:
            self.read_steps(distributed)  # without this step, to which hooks may still log
        if self._opening:  # a resumed run is in the file from its first step on
            self._write(())
        self._unread.append(result)

    def log(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values to the next report, which are read later."""
        self._unread_values.add(values)

    def add_epoch(self, record: EpochRecord) -> None:
        """Add an epoch."""
        self._epochs.append(record)
        self._write([("epoch", asdict(record))])

    def add_evaluations(self, step: int, epoch: int, results: Mapping[str, EvalResult]) -> None:
        """Add the results of an evaluation of all sets. They are written with the report that follows."""
        records = [EvaluationRecord(step, epoch, name, result.loss, result.metrics) for name, result in results.items()]
        self.evaluations += records
        self._unwritten += records

    def add_values(self, record: ValuesRecord) -> None:
        """Add a report."""
        if len(self._values) >= VALUES_IN_MEMORY:
            old, recent = self._values[:-RECENT_VALUES], self._values[-RECENT_VALUES:]
            self._values = [*thin_out(old, VALUES_IN_MEMORY // 2), *recent]
        self._values.append(record)
        unwritten, self._unwritten = self._unwritten, []
        if self._file is not None:
            evaluations = [("evaluation", asdict(evaluation)) for evaluation in unwritten]
            self._write([*evaluations, ("values", asdict(record))])

    def read_steps(self, distributed: DistributedRuntime) -> None:
        """Read the unread steps and logged values from the device, and average them over the ranks. A collective."""
        unread, self._unread = self._unread, []
        values, self._unread_values = self._unread_values, LoggedValues()
        if not unread and not values.sums and distributed.is_single_process:
            return
        results = [*unread, values.as_result(unread[-1].loss if unread else NO_LOSS)]
        (*losses, _), (*sums, logged_values), names = read_results(results, distributed)
        logged = [means(of_step) for of_step in sums]
        records = []
        for result, loss, values_of_step in zip(unread, losses, logged, strict=True):
            rate = float(result.learning_rate)
            reported = {name: float(group_rate) for name, group_rate in result.group_rates.items()} | values_of_step
            records.append(StepRecord(result.step, result.epoch, loss, rate, result.items, reported))
        for part in (self._of_epoch, self._since_report):
            part.add(losses, [result.items for result in unread], logged)
            add_sums(part.logged, logged_values)
        self._steps.extend(records)
        self._write(("step", asdict(record)) for record in records)
        self.step_names |= names

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the file's content, and the steps that memory dropped. `read_steps` comes first."""
        assert not self._unread, "read_steps() comes first"
        return {
            "epochs": [asdict(epoch) for epoch in self._epochs],
            # Text is faster to write and read than thousands of dicts.
            "steps": json.dumps([STEP_FIELDS(step) for step in self._steps]),
            "values": json.dumps([(record.step, record.epoch, record.values) for record in self._values]),
            "evaluations": [asdict(record) for record in self.evaluations],
            "initial": {name: asdict(result) for name, result in self.initial.items()},
            "of_epoch": self._of_epoch.state_dict(),
            "since_report": self._since_report.state_dict(),
            "step_names": sorted(self.step_names),
            "file": None if self._file is None else self._file.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history, and continue in its file.

        Raises:
            DamagedCheckpointError: The file does not hold what was written.
        """
        if self._file is not None and state_dict["file"] is not None:
            self._file.load_state_dict(state_dict["file"])
        self._epochs = [_decode_epoch(epoch) for epoch in state_dict["epochs"]]
        self._steps = deque((StepRecord(*row) for row in json.loads(state_dict["steps"])), STEPS_IN_MEMORY)
        self._values = [ValuesRecord(*row) for row in json.loads(state_dict["values"])]
        self.evaluations = [EvaluationRecord(**record) for record in state_dict["evaluations"]]
        self.initial = _decode_results(state_dict["initial"])
        self._of_epoch = StepMeans(**state_dict["of_epoch"])
        self._since_report = StepMeans(**state_dict["since_report"])
        self.step_names = set(state_dict["step_names"])

    def pop_epoch(self) -> tuple[StepMeans, dict[str, float], dict[str, float]]:
        """Return the sums since the last call, and means by name: of what hooks logged, and of what steps logged."""
        epoch, self._of_epoch = self._of_epoch, StepMeans()
        logged = means(epoch.logged)
        by_steps = {name: logged.pop(name) for name in [*logged] if name in self.step_names}
        return epoch, logged, by_steps

    def pop_report(self) -> StepMeans:
        """Return the sums over the steps, and over the logged values, since the last call."""
        since_report, self._since_report = self._since_report, StepMeans()
        return since_report

    def to_dict(self) -> dict[str, list[float]]:
        """Return the epochs as columns by name; NaN where an epoch has no such value."""
        rows = [{"epoch": float(e.epoch), "step": float(e.step), "seconds": e.seconds, **e.values()} for e in self]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name, math.nan) for row in rows] for name in names}

    def write_jsonl(self, path: str | Path) -> None:
        """Write the steps and values in memory, the evaluations and the epochs, one JSON object per line."""
        kinds: dict[str, Iterable[Any]] = {
            "step": self._steps,
            "values": self._values,
            "evaluation": self.evaluations,
            "epoch": self._epochs,
        }
        records = [(kind, asdict(record)) for kind, parts in kinds.items() for record in parts]
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(to_json({"kind": kind, **record}) + "\n" for kind, record in records)

    def to_dataframe(self) -> pd.DataFrame:
        """Return the epochs as a data frame, one row each.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        with with_install_note("history.to_dataframe()", "pandas"):
            import pandas as pd

        return pd.DataFrame(self.to_dict())

    def plot(self, *names: str) -> Figure:
        """Draw the run over its optimizer steps: a panel each for the loss, the metrics and the learning rate.

        Lines are means over the training steps since the last report. Marks are evaluations. The figure does not belong
        to pyplot: a notebook shows it, and `figure.savefig(path)` writes it to a file.

        Args:
            names: What to draw, in place of that: `"loss"`, metrics such as `"accuracy"`, and other reported values,
                such as `"grad_norm"`.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            OptionError: A name was not reported, or nothing was.
        """
        with with_install_note("history.plot()", "ptacc[plot]"):
            from ptacc.run.plot import draw_run  # it needs matplotlib, which takes long to import
        return draw_run(self._values, self.evaluations, names)

    def _repr_html_(self) -> str:
        return history_html(self._epochs, self.evaluations, self.stop_reason)

    @override
    def __repr__(self) -> str:
        return f"RunHistory({len(self)} epochs, {len(self._steps)} steps in memory)"

    def _write(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        if self._file is not None:
            opening, self._opening = self._opening, []
            self._file.append([*opening, *records])


def utc_now() -> str:
    """Return the time as ISO 8601 text, in UTC and in whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def thin_out(records: Sequence[ValuesRecord], number: int) -> list[ValuesRecord]:
    """Return at most about `number` of the records, evenly spaced over the steps."""
    kept = [records[0]]
    for record in records:
        if record.step - kept[-1].step >= records[-1].step / number:
            kept.append(record)
    return kept


def _decode_epoch(state: Mapping[str, Any]) -> EpochRecord:
    values: dict[str, Any] = {**state, "evaluations": _decode_results(state["evaluations"])}
    return EpochRecord(**values)


def _decode_results(states: Mapping[str, Mapping[str, Any]]) -> dict[str, EvalResult]:
    return {name: EvalResult(**state) for name, state in states.items()}

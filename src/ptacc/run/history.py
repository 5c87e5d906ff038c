"""The history of a run: what steps and epochs reported, flat in memory however long the run is."""

from __future__ import annotations

import functools
import json
import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.run.history_file import HistoryFile
from ptacc.types.outputs import EpochRecord, EvalResult, StepRecord
from ptacc.types.progress import RunPlan

if TYPE_CHECKING:
    import pandas as pd

STEPS_IN_MEMORY = 1000


NO_LOSS = torch.zeros(())
"""The loss of a step none of whose batches is through."""


@dataclass(slots=True)
class StepResult:
    """One step, its values still on the device.

    Args:
        step: The number of this step, counted from 1.
        epoch: The number of its epoch, counted from 1.
        items: Number of items of the step, over all processes.
        learning_rate: As used by this step.
        loss: Scalar on the device; its mean over the processes is the step's mean loss.
        logged: Further scalars, floats or tensors on the device; likewise.
        weights: Of those that not every batch may have logged, the share of items that did.
    """

    step: int
    epoch: int
    items: float
    learning_rate: float | Tensor
    loss: Tensor = NO_LOSS
    logged: dict[str, Tensor | float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    def add(self, loss: Tensor, logged: Mapping[str, Tensor], weight: float) -> None:
        """Add one batch: its share of the loss, and means over it with their weight in the step's."""
        self.loss = loss if self.loss is NO_LOSS else self.loss + loss
        for name, value in logged.items() if weight else ():  # a mean over nothing is NaN, and counts for nothing
            self.logged[name] = self.logged.get(name, 0.0) + value.detach() * weight
            self.weights[name] = self.weights.get(name, 0.0) + weight


class RunHistory(Sequence[EpochRecord]):
    """What a run reported: a sequence of its epochs, and `steps` for the last 1,000 of its steps.

    Attributes:
        stop_reason: Why the run was stopped before its end, None where it was not.
        initial: What was evaluated before the first step, by the name of the set.

    Example:
        >>> history = RunHistory()
        >>> history.add_epoch(EpochRecord(epoch=1, step=10, train_loss=0.5, items=320, seconds=1.0, learning_rate=0.1))
        >>> history[-1].train_loss
        0.5
        >>> history.to_dict()["train_loss"]
        [0.5]
    """

    def __init__(self, file: str | Path | None = None) -> None:
        """Start an empty history.

        Args:
            file: Append every record to this file as JSON lines, too; the steps that memory forgets stay there.
        """
        self.stop_reason: str | None = None
        self.initial: dict[str, EvalResult] = {}
        self._epochs: list[EpochRecord] = []
        self._steps: deque[StepRecord] = deque(maxlen=STEPS_IN_MEMORY)
        self._unread: list[StepResult] = []
        self._logged: dict[str, tuple[float, int]] = {}
        self._journal = None if file is None else HistoryFile(Path(file))

    @overload
    def __getitem__(self, index: int) -> EpochRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EpochRecord]: ...
    @override
    def __getitem__(self, index: int | slice) -> EpochRecord | Sequence[EpochRecord]:
        """Return one epoch's record, or a slice of them."""
        return self._epochs[index]

    @override
    def __len__(self) -> int:
        """Return the number of epochs begun."""
        return len(self._epochs)

    @override
    def __iter__(self) -> Iterator[EpochRecord]:
        """Iterate over the epochs."""
        return iter(self._epochs)

    @property
    def steps(self) -> Sequence[StepRecord]:
        """The last 1,000 steps that were read from the device: all of them once an epoch has ended."""
        return tuple(self._steps)

    def begin(self, seed: int, plan: RunPlan) -> None:
        """Write where a run begins in the file, which may hold several."""
        self._append([("run", {"seed": seed, **asdict(plan)})])

    def add_step(self, result: StepResult) -> None:
        """Keep a step, its values unread."""
        self._unread.append(result)

    @property
    def has_many_unread_steps(self) -> bool:
        """Whether so many steps are unread that they should be read now."""
        return len(self._unread) >= STEPS_IN_MEMORY

    def add_epoch(self, record: EpochRecord) -> None:
        """Keep an epoch."""
        self._epochs.append(record)
        self._append([("epoch", asdict(record))])

    def read_steps(self, distributed: DistributedRuntime) -> None:
        """Read the unread steps from the device, and put the processes' parts together.

        A collective: every process reads at the same step.
        """
        unread, self._unread = self._unread, []
        if not unread:
            return
        records = [
            StepRecord(result.step, result.epoch, loss, float(result.learning_rate), result.items, logged)
            for result, (loss, logged) in zip(unread, _read(unread, distributed), strict=True)
        ]
        self._steps.extend(records)
        if self._journal is not None:
            self._journal.append([("step", asdict(record)) for record in records])
        for record in records:
            for name, value in record.logged.items():
                total, count = self._logged.get(name, (0.0, 0))
                self._logged[name] = total + value, count + 1

    def state_dict(self) -> dict[str, Any]:
        """Return what was reported, all of it read from the device: the epochs, and the steps in memory."""
        assert not self._unread, "read_steps() comes first"
        return {
            "epochs": [asdict(epoch) for epoch in self._epochs],
            "steps": _columns(self._steps),
            "initial": {name: asdict(result) for name, result in self.initial.items()},
            "logged": dict(self._logged),
            "file": None if self._journal is None else self._journal.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was reported, and in the file from there.

        Raises:
            DamagedCheckpointError: The file is not what was written.
        """
        if self._journal is not None and state_dict["file"] is not None:
            self._journal.load_state_dict(state_dict["file"])
        self._epochs = [_epoch(state) for state in state_dict["epochs"]]
        self._steps = deque(_records(state_dict["steps"]), maxlen=STEPS_IN_MEMORY)
        self.initial = _results(state_dict["initial"])
        self._logged = dict(state_dict["logged"])

    def pop_logged_means(self) -> dict[str, float]:
        """Return the means over the steps read since this was last asked, of what they logged."""
        logged, self._logged = self._logged, {}
        return {name: total / count for name, (total, count) in logged.items()}

    def to_dict(self) -> dict[str, list[float]]:
        """Return the epochs as columns by name; NaN where an epoch has no such value."""
        rows = [{"epoch": float(e.epoch), "step": float(e.step), "seconds": e.seconds, **e.values()} for e in self]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name, math.nan) for row in rows] for name in names}

    def write_jsonl(self, path: str | Path) -> None:
        """Write the epochs and the steps in memory to `path`, one JSON object a line."""
        with Path(path).open("w", encoding="utf-8") as file:
            _write(file, [("step", asdict(step)) for step in self._steps])
            _write(file, [("epoch", asdict(epoch)) for epoch in self._epochs])

    def to_dataframe(self) -> pd.DataFrame:
        """Return the epochs as a data frame, one row each.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        import pandas as pd

        return pd.DataFrame(self.to_dict())

    @override
    def __repr__(self) -> str:
        return f"RunHistory({len(self)} epochs, {len(self._steps)} steps in memory)"

    def _append(self, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        if self._journal is not None:
            self._journal.append(lines)


def _read(unread: Sequence[StepResult], distributed: DistributedRuntime) -> list[tuple[float, dict[str, float]]]:
    """Read the losses and the logged values with one copy from the device, and average the processes' parts."""
    names = sorted(set[str]().union(*distributed.gather({name for result in unread for name in result.logged})))
    cells = [(i, name) for i in range(len(unread)) for name in names]
    losses = torch.stack([result.loss for result in unread]).to(torch.float64)
    logged = [torch.as_tensor(unread[i].logged.get(name, 0.0)) for i, name in cells]
    further = [value.detach().to(losses.device, torch.float64).reshape(1) for value in logged]
    values: list[float] = torch.cat([losses, *further]).tolist()
    # Not every step logs every name, and not on every process.
    weights = [unread[i].weights.get(name, 1.0) if name in unread[i].logged else 0.0 for i, name in cells]
    sums = distributed.sum([*values, *weights])
    read: list[tuple[float, dict[str, float]]] = [(loss / distributed.world_size, {}) for loss in sums[: len(unread)]]
    first, last = len(unread), len(values)
    for (i, name), value, weight in zip(cells, sums[first:last], sums[last:], strict=True):
        if weight:
            read[i][1][name] = value / weight
    return read


def _epoch(state: Mapping[str, Any]) -> EpochRecord:
    fields: dict[str, Any] = {**state, "evaluations": _results(state["evaluations"])}
    return EpochRecord(**fields)


def _results(states: Mapping[str, Mapping[str, Any]]) -> dict[str, EvalResult]:
    return {name: EvalResult(**state) for name, state in states.items()}


def _write(file: IO[str], lines: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    file.writelines(json.dumps({"kind": kind, **record}) + "\n" for kind, record in lines)


COUNTS = ("step", "epoch", "items")
VALUES = ("loss", "learning_rate")
"""The fields of a step's record that each have one number."""


def _columns(records: Collection[StepRecord]) -> dict[str, Any]:
    """Return records as tensors, one for each field: a thousand records are saved as often as the run is."""
    double = functools.partial(torch.tensor, dtype=torch.float64)
    counts = {name: [getattr(record, name) for record in records] for name in COUNTS}
    are_whole = {name: all(type(count) is int for count in column) for name, column in counts.items()}
    logged: dict[str, tuple[list[int], list[float]]] = {}
    for index, record in enumerate(records):
        for name, value in record.logged.items():
            places, values = logged.setdefault(name, ([], []))
            places.append(index)
            values.append(value)
    return {
        **{name: torch.tensor(column) if are_whole[name] else double(column) for name, column in counts.items()},
        **{name: double([getattr(record, name) for record in records]) for name in VALUES},
        "logged": {name: (torch.tensor(places), double(values)) for name, (places, values) in logged.items()},
    }


def _records(columns: Mapping[str, Any]) -> Iterator[StepRecord]:
    """Yield the records that `_columns` was given."""
    logged: dict[int, dict[str, float]] = {}
    for name, (places, values) in columns["logged"].items():
        for index, value in zip(places.tolist(), values.tolist(), strict=True):
            logged.setdefault(index, {})[name] = value
    rows = zip(*(columns[name].tolist() for name in (*COUNTS, *VALUES)), strict=True)
    for index, (step, epoch, items, loss, learning_rate) in enumerate(rows):
        yield StepRecord(step, epoch, loss, learning_rate, items, logged.get(index, {}))

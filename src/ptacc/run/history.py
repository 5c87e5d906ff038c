"""The history of a run: what steps and epochs reported, in constant memory however long the run is."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.run.history_file import HistoryFile, to_json
from ptacc.tensors.devices import widest_float
from ptacc.types.outputs import EpochRecord, EvalResult, StepRecord
from ptacc.types.progress import RunPlan

if TYPE_CHECKING:
    import pandas as pd

STEPS_IN_MEMORY = 1000
STEP_FIELDS = attrgetter(*(field.name for field in fields(StepRecord)))
NO_LOSS = torch.zeros(())
"""The loss of a step before its first batch."""


@dataclass(slots=True)
class StepResult:
    """The values of one step, still on the device.

    Args:
        step: Number of the step, from 1.
        epoch: Number of its epoch, from 1.
        items: Number of items of the step, over all ranks.
        learning_rate: Learning rate of the step.
        loss: Scalar on the device. Its mean over the ranks is the mean loss of the step.
        logged: Further scalars, as floats or tensors on the device, averaged over the ranks likewise.
        weights: The fraction of the items to which a logged value applies, for values that some batches did not log.
        group_rates: Learning rates of the parameter groups by name, if there are several.
    """

    step: int
    epoch: int
    items: float
    learning_rate: float | Tensor
    loss: Tensor = NO_LOSS
    logged: dict[str, Tensor | float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    group_rates: Mapping[str, float | Tensor] = field(default_factory=dict)

    def add(self, loss: Tensor, logged: Mapping[str, Tensor], weight: float) -> None:
        """Add a batch: its scaled loss, and means over the batch with their weight in the means over the step."""
        self.loss = loss if self.loss is NO_LOSS else self.loss + loss
        for name, value in logged.items() if weight else ():  # a mean over no items is NaN
            self._add_logged(name, value.detach() * weight, weight)

    def add_update(self, name: str, loss: Tensor, logged: Mapping[str, Tensor], weight: float) -> None:
        """Add a batch in one of several updates, whose own mean loss is reported by `name`."""
        self.add(loss, logged, weight)
        if weight:
            self._add_logged(name, loss, weight)

    def _add_logged(self, name: str, value: Tensor, weight: float) -> None:
        self.logged[name] = self.logged.get(name, 0.0) + value
        self.weights[name] = self.weights.get(name, 0.0) + weight


class RunHistory(Sequence[EpochRecord]):
    """What a run reported: a sequence of its epochs, and `steps` for the last 1,000 of its steps.

    Args:
        file: A file to which every record is appended as a JSON line. It keeps the steps that memory drops.

    Attributes:
        stop_reason: Why the run stopped before its planned end; None if it did not.
        initial: Results of the evaluations before the first step, by the name of the set.

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
        self._epochs: list[EpochRecord] = []
        self._steps: deque[StepRecord] = deque(maxlen=STEPS_IN_MEMORY)
        self._unread: list[StepResult] = []
        self._loss_sum = 0.0
        self._logged: dict[str, tuple[float, int]] = {}
        self._step_names: set[str] = set()
        self._file = file

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

    def begin(self, seed: int, plan: RunPlan) -> None:
        """Write the first line of a new file."""
        checkpoints = None if self._file is None else self._file.checkpoints
        self._write([("run", {"seed": seed, **asdict(plan), "checkpoints": checkpoints})])

    def add_step(self, result: StepResult, distributed: DistributedRuntime) -> None:
        """Add a step, whose values are read later. Every 1,000 steps, read the values of the steps before it."""
        if len(self._unread) >= STEPS_IN_MEMORY:
            self.read_steps(distributed)  # without this step, to which hooks may still log
        self._unread.append(result)

    def add_epoch(self, record: EpochRecord) -> None:
        """Add an epoch."""
        self._epochs.append(record)
        self._write([("epoch", asdict(record))])

    def read_steps(self, distributed: DistributedRuntime) -> None:
        """Read the values of the unread steps from the device, and average them over the ranks. A collective."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        read, names = _read(unread, distributed)
        records = []
        for result, (loss, logged) in zip(unread, read, strict=True):
            reported = {name: float(rate) for name, rate in result.group_rates.items()} | logged
            rate = float(result.learning_rate)
            records.append(StepRecord(result.step, result.epoch, loss, rate, result.items, reported))
            self._loss_sum += loss * result.items
            for name, value in logged.items():
                total, count = self._logged.get(name, (0.0, 0))
                self._logged[name] = total + value, count + 1
        self._steps.extend(records)
        self._write(("step", asdict(record)) for record in records)
        self._step_names |= names

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs, and the steps in memory. `read_steps` must have been called."""
        assert not self._unread, "read_steps() comes first"
        return {
            "epochs": [asdict(epoch) for epoch in self._epochs],
            "steps": json.dumps([STEP_FIELDS(step) for step in self._steps]),  # faster than a thousand dicts
            "initial": {name: asdict(result) for name, result in self.initial.items()},
            "loss_sum": self._loss_sum,
            "logged": dict(self._logged),
            "step_names": sorted(self._step_names),
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
        self.initial = _decode_results(state_dict["initial"])
        self._loss_sum = state_dict["loss_sum"]
        self._logged, self._step_names = dict(state_dict["logged"]), set(state_dict["step_names"])

    def pop_loss_sum(self) -> float:
        """Return the sum of the losses of all items of the steps read since the last call."""
        loss_sum, self._loss_sum = self._loss_sum, 0.0
        return loss_sum

    def pop_logged_means(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means over the steps read since the last call: of what hooks logged, and of what steps logged."""
        means = {name: total / count for name, (total, count) in self._logged.items()}
        by_steps = {name: means.pop(name) for name in [*means] if name in self._step_names}
        self._logged = {}
        return means, by_steps

    def to_dict(self) -> dict[str, list[float]]:
        """Return the epochs as columns by name; NaN where an epoch has no such value."""
        rows = [{"epoch": float(e.epoch), "step": float(e.step), "seconds": e.seconds, **e.values()} for e in self]
        names = list(dict.fromkeys(name for row in rows for name in row))
        return {name: [row.get(name, math.nan) for row in rows] for name in names}

    def write_jsonl(self, path: str | Path) -> None:
        """Write the steps in memory and the epochs to `path`, one JSON object per line."""
        records = [("step", asdict(step)) for step in self._steps] + [("epoch", asdict(epoch)) for epoch in self]
        with Path(path).open("w", encoding="utf-8") as file:
            file.writelines(to_json({"kind": kind, **record}) + "\n" for kind, record in records)

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

    def _write(self, records: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        if self._file is not None:
            self._file.append(records)


def _read(
    unread: Sequence[StepResult], distributed: DistributedRuntime
) -> tuple[list[tuple[float, dict[str, float]]], set[str]]:
    """Return the losses and the logged values of steps: one copy from the device, averaged over the ranks.

    The names of the values that `train_step` logged are returned, too.
    """
    own = {(name, name in result.weights) for result in unread for name in result.logged}
    all_names = set[tuple[str, bool]]().union(*distributed.gather(own))
    names = sorted({name for name, _ in all_names})
    cells = [(i, name) for i in range(len(unread)) for name in names]
    losses = torch.stack([result.loss for result in unread])
    losses = losses.to(widest_float(losses.device))
    logged = [torch.as_tensor(unread[i].logged.get(name, 0.0), dtype=losses.dtype) for i, name in cells]
    logged = [value.detach().to(losses.device).reshape(1) for value in logged]
    values: list[float] = torch.cat([losses, *logged]).tolist()
    # Not every step logs every name, and not on every rank.
    weights = [unread[i].weights.get(name, 1.0) if name in unread[i].logged else 0.0 for i, name in cells]
    sums = distributed.sum([*values, *weights])
    read: list[tuple[float, dict[str, float]]] = [(loss / distributed.world_size, {}) for loss in sums[: len(unread)]]
    first, last = len(unread), len(values)
    for (i, name), value, weight in zip(cells, sums[first:last], sums[last:], strict=True):
        if weight:
            read[i][1][name] = value / weight
    return read, {name for name, is_from_step in all_names if is_from_step}


def _decode_epoch(state: Mapping[str, Any]) -> EpochRecord:
    values: dict[str, Any] = {**state, "evaluations": _decode_results(state["evaluations"])}
    return EpochRecord(**values)


def _decode_results(states: Mapping[str, Mapping[str, Any]]) -> dict[str, EvalResult]:
    return {name: EvalResult(**state) for name, state in states.items()}

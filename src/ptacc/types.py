"""Values: what steps put out, what a run reports, how its length and its cadences are told.

Terms: a *batch* is one item of a loader, a *step* is one optimizer update, an *epoch* is one pass over the data. An
*item* is what the loss is a mean over: a sample, or a token. Counts are of completed things.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Generic, Literal, TypeAlias, get_args, overload

from torch import Tensor
from typing_extensions import TypeVar, override

from ptacc.errors import OptionError
from ptacc.validation import check_at_least, check_positive

BatchT = TypeVar("BatchT", default=tuple[Tensor, Tensor])
OutputT = TypeVar("OutputT", default=Tensor)
OutputT_co = TypeVar("OutputT_co", covariant=True, default=Tensor)
SampleT = TypeVar("SampleT", default=BatchT)
"""Samples that the default collate function turns into a batch: of the batch's own type, if not said otherwise."""
RawT = TypeVar("RawT")
"""Samples that a collate function of the user's own takes."""

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A supervised batch: inputs `(items, ...)` and targets `(items, ...)`."""

PairSample: TypeAlias = tuple[Tensor, int] | tuple[Tensor, float] | tuple[Tensor, ...]
"""Samples that torch's own collate function turns into a `Pair`."""

Precision: TypeAlias = Literal["no", "fp16", "bf16"]
ZeroStage: TypeAlias = Literal[0, 1, 2, 3]
CompileBackend: TypeAlias = Literal["no", "eager", "aot_eager", "inductor", "cudagraphs", "onnxrt", "tensorrt", "tvm"]
CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune"]
Sharding: TypeAlias = Literal["auto", "already"]
Mode: TypeAlias = Literal["min", "max"]
Duration: TypeAlias = float | timedelta
"""A length of time: seconds, or a `timedelta`."""


# ---- what a step puts out


@dataclass(frozen=True, slots=True)
class StepOutput(Generic[OutputT_co]):
    """What `train_step` and `eval_step` return.

    Args:
        loss: Scalar, the mean over the batch's items (or their sum, see `from_sum`), with its graph when training.
        outputs: Whatever the step computed that metrics and predictions need, such as logits `(items, classes)`.
        logged: Further scalars to report, each a mean over the batch's items. They are averaged over all items of
            the step, and read from the device only when the history is.
        is_sum: Whether `loss` is a sum over the batch's items; set by `from_sum`.

    Example:
        >>> import torch
        >>> StepOutput(loss=torch.tensor(0.5), outputs=torch.zeros(2)).is_sum
        False
    """

    loss: Tensor
    outputs: OutputT_co
    logged: Mapping[str, Tensor] = field(default_factory=dict)
    is_sum: bool = False

    @staticmethod
    def from_sum(
        loss_sum: Tensor, *, outputs: OutputT, logged: Mapping[str, Tensor] | None = None
    ) -> StepOutput[OutputT]:
        """Make the output of a step whose loss is a sum over the items, right also for a batch with no items.

        Args:
            loss_sum: Scalar, the sum of the items' losses (`reduction="sum"`).
            outputs: As for `StepOutput`.
            logged: As for `StepOutput`; these remain means.

        Returns:
            An output that counts the same as one with the mean, wherever a batch has items.
        """
        return StepOutput(loss=loss_sum, outputs=outputs, logged=logged or {}, is_sum=True)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What one evaluation found, the same on every process.

    Args:
        loss: Mean over all items of the data, each counted once.
        metrics: The computed metrics by name.
    """

    loss: float
    metrics: Mapping[str, float]

    def values(self, prefix: str = "") -> dict[str, float]:
        """Name the results as monitors do: `eval_loss` and the metrics' own names, or `<set>/loss`, `<set>/<metric>`.

        Args:
            prefix: The name of the evaluation set where there are several; empty where there is one.

        Example:
            >>> EvalResult(loss=0.5, metrics={"accuracy": 0.9}).values()
            {'eval_loss': 0.5, 'accuracy': 0.9}
            >>> EvalResult(loss=0.5, metrics={"accuracy": 0.9}).values("test")
            {'test/loss': 0.5, 'test/accuracy': 0.9}
        """
        if not prefix:
            return {"eval_loss": self.loss, **self.metrics}
        return {f"{prefix}/loss": self.loss} | {f"{prefix}/{name}": value for name, value in self.metrics.items()}


class Predictions(Sequence[OutputT_co]):
    """The outputs for a dataset, one for each sample, in the dataset's order.

    `torch.stack(list(predictions))` makes one tensor of tensors.

    Example:
        >>> import torch
        >>> predictions = Predictions([torch.tensor([0.1, 0.9]), torch.tensor([0.8, 0.2])])
        >>> [int(scores.argmax()) for scores in predictions]
        [1, 0]
    """

    def __init__(self, outputs: Sequence[OutputT_co]) -> None:
        """Hold `outputs`, one for each sample."""
        self._outputs = outputs

    @overload
    def __getitem__(self, index: int) -> OutputT_co: ...
    @overload
    def __getitem__(self, index: slice) -> Predictions[OutputT_co]: ...
    @override
    def __getitem__(self, index: int | slice) -> OutputT_co | Predictions[OutputT_co]:
        """Return the output for one sample, or the predictions for a slice of them."""
        return Predictions(self._outputs[index]) if isinstance(index, slice) else self._outputs[index]

    @override
    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._outputs)

    @override
    def __iter__(self) -> Iterator[OutputT_co]:
        """Iterate over the samples' outputs in the dataset's order."""
        return iter(self._outputs)

    @override
    def __repr__(self) -> str:
        return f"Predictions({len(self)} samples)"


# ---- how far a run is, and how long it will be


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Every count is of completed things.

    Args:
        steps: Optimizer updates that happened.
        epochs: Whole passes over the data.
        batches: Batches of the current epoch that were trained on, per process.
        offset: Where the processes are in the epoch's data: samples that they took together, or batches of a loader.
        items: Items trained on, over all processes.
        seconds: Time since the run started, as this process sees it at the end of the last step.
    """

    steps: int = 0
    epochs: int = 0
    batches: int = 0
    offset: int = 0
    items: float = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The length of a run in optimizer steps, the same for any number of processes.

    Args:
        known_epochs: Number of epochs, where it is known.
        known_steps_per_epoch: Steps of one epoch, where it is known.
        known_total_steps: Steps of the whole run, where it is known.
        epoch_limit: Epochs at most, where the run was given a limit. Steps that a gradient scaler skips count
            nowhere, so that as many steps may take more epochs than were planned.

    A length that nobody can know (a stream has no epochs' ends to plan with) raises when it is asked for, so that a
    schedule never gets a made-up number.

    Example:
        >>> plan = RunPlan.of(num_epochs=3, steps_per_epoch=10, max_steps=25)
        >>> plan.total_steps
        25
    """

    known_epochs: int | None = None
    known_steps_per_epoch: int | None = None
    known_total_steps: int | None = None
    epoch_limit: int | None = None

    @classmethod
    def of(cls, num_epochs: int | None, steps_per_epoch: int | None, max_steps: int | None) -> RunPlan:
        """Work the plan out from what is known: whichever of `num_epochs` and `max_steps` comes first."""
        limits = [max_steps] if max_steps is not None else []
        if num_epochs is not None and steps_per_epoch is not None:
            limits.append(num_epochs * steps_per_epoch)
        total, epoch_limit = min(limits) if limits else None, num_epochs
        if total is not None and steps_per_epoch:
            epochs_needed = math.ceil(total / steps_per_epoch)
            num_epochs = epochs_needed if num_epochs is None else min(num_epochs, epochs_needed)
        return cls(num_epochs, steps_per_epoch, total, epoch_limit)

    @property
    def num_epochs(self) -> int:
        """Epochs of the run, a last partial one included."""
        return self._known(self.known_epochs, "num_epochs")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self._known(self.known_steps_per_epoch, "steps_per_epoch")

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self._known(self.known_total_steps, "total_steps")

    def _known(self, value: int | None, name: str) -> int:
        if value is None:
            raise OptionError(
                f"RunPlan.{name}: not known for this run, whose data has no length. "
                "Give max_steps to train(), and size the schedule by plan.total_steps."
            )
        return value


# ---- cadences: the same for evaluating, saving, logging


@dataclass(frozen=True, slots=True)
class Steps:
    """Every `n` optimizer steps."""

    n: int

    def __post_init__(self) -> None:
        check_at_least("Steps", "n", self.n, 1)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Say whether this is due at `now`, when it was last done at `last`."""
        return now.steps > last.steps and now.steps % self.n == 0


@dataclass(frozen=True, slots=True)
class Epochs:
    """Every `n` epochs, at their end."""

    n: int

    def __post_init__(self) -> None:
        check_at_least("Epochs", "n", self.n, 1)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Say whether this is due at `now`, when it was last done at `last`."""
        return now.epochs > last.epochs and now.epochs % self.n == 0


@dataclass(frozen=True, slots=True)
class Minutes:
    """Every `n` minutes, at the first step or epoch end after that, by the clock of rank 0."""

    n: float

    def __post_init__(self) -> None:
        check_positive("Minutes", "n", self.n)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Say whether this is due at `now`, when it was last done at `last`."""
        return now.seconds - last.seconds >= 60 * self.n


Cadence: TypeAlias = Steps | Epochs | Minutes


# ---- what a run reports


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step.

    Args:
        step: The number of this step, counted from 1.
        epoch: The number of its epoch, counted from 1.
        loss: Mean over all items of the step: all its batches, all processes.
        learning_rate: Learning rate of the first parameter group, as used by this step.
        items: Number of those items.
        logged: Further values by name, such as `grad_norm` and what `StepOutput.logged` gave.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    items: float
    logged: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One pass over the data, with what was evaluated in it.

    Args:
        epoch: The number of this epoch, counted from 1.
        step: Optimizer steps completed at its end.
        train_loss: Mean over all items trained on in this epoch.
        items: Number of those items.
        seconds: Duration of the epoch with its evaluations.
        learning_rate: Learning rate of the first parameter group at the epoch's last step.
        is_complete: False where the run ended within the epoch.
        evaluations: The last evaluation of each set in this epoch, by name (`""` where there is one unnamed set).
        logged: Means over the epoch's steps of what steps logged, such as `grad_norm`.
        train_metrics: Metrics over the training batches, where a mixin computes any.
    """

    epoch: int
    step: int
    train_loss: float
    items: float
    seconds: float
    learning_rate: float
    is_complete: bool = True
    evaluations: Mapping[str, EvalResult] = field(default_factory=dict)
    logged: Mapping[str, float] = field(default_factory=dict)
    train_metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def eval_loss(self) -> float | None:
        """Loss of the one unnamed evaluation set, None where it was not evaluated in this epoch."""
        result = self.evaluations.get("")
        return None if result is None else result.loss

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the one unnamed evaluation set, empty where it was not evaluated in this epoch."""
        result = self.evaluations.get("")
        return {} if result is None else result.metrics

    def values(self) -> dict[str, float]:
        """Return every value of the epoch by the name that a monitor calls it by."""
        values = {"train_loss": self.train_loss, "learning_rate": self.learning_rate}
        values |= self.logged
        values |= {f"train/{name}": value for name, value in self.train_metrics.items()}
        for name, result in self.evaluations.items():
            values |= result.values(name)
        return values


@dataclass(frozen=True, slots=True)
class Monitored:
    """A handle for a value that is reported, declared once by whoever reports it and then passed about, not spelt.

    Args:
        name: The value's name, as in `EpochRecord.values()`.
        mode: Whether less or more is better.

    Example:
        >>> ACCURACY = Monitored("accuracy", mode="max")
        >>> ACCURACY.is_better(0.9, than=0.8)
        True
    """

    name: str
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise OptionError(f'Monitored({self.name!r}, mode={self.mode!r}): must be "min" or "max".')

    def is_better(self, value: float, than: float) -> bool:
        """Say whether `value` beats `than`. NaN never does; anything beats NaN."""
        if math.isnan(value):
            return False
        return math.isnan(than) or (value < than if self.mode == "min" else value > than)


def as_monitored(monitor: str | Monitored, mode: Mode = "min") -> Monitored:
    """Return the handle for `monitor`; a name takes `mode` along, a handle knows its own."""
    return monitor if isinstance(monitor, Monitored) else Monitored(monitor, mode)


@dataclass(frozen=True, slots=True)
class Best:
    """The best by a value that is reported: what `keep_best` keeps.

    Args:
        monitor: The value, by its name or handle.
        mode: Whether less or more is better; a handle knows that itself.
        count: How many, at least 1.
    """

    monitor: str | Monitored
    mode: Mode = "min"
    count: int = 1

    def __post_init__(self) -> None:
        check_at_least("Best", "count", self.count, 1)
        as_monitored(self.monitor, self.mode)

    @property
    def monitored(self) -> Monitored:
        """The handle of the value."""
        return as_monitored(self.monitor, self.mode)

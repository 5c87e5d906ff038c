"""Values that steps return, and that evaluations and runs report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, cast

from torch import Tensor

from ptacc.types.aliases import OutputT, OutputT_co

RESERVED_NAMES = frozenset({"loss", "eval_loss", "train_loss", "learning_rate"})
"""Names of values that every run reports."""
REPORTED_NAMES = RESERVED_NAMES | {"epoch", "items_per_second"}
"""Names of values that are in every report."""

# ---- what a step returns


@dataclass(frozen=True, slots=True)
class StepOutput(Generic[OutputT_co]):
    """What `train_step` and `eval_step` return.

    Args:
        loss: Scalar, the mean over the batch's items (or their sum, see `from_sum`), with its graph in training.
        outputs: What metrics and predictions need, such as logits `(items, classes)`.
        logged: Further scalars to report, each a mean over the batch's items. They are averaged over all items of
            the step, and are copied from the device together with the history. Those of `eval_step` are averaged over
            all items of the evaluation, and are among its metrics.
        is_sum: Whether `loss` is a sum over the batch's items. Set by `from_sum`.

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
        """Return the output of a step whose loss is a sum over the batch's items. The batch may have no items.

        Args:
            loss_sum: Scalar, the sum of the items' losses (`reduction="sum"`).
            outputs: As for `StepOutput`.
            logged: As for `StepOutput`: means over the batch's items.
        """
        return StepOutput(loss=loss_sum, outputs=outputs, logged=logged or {}, is_sum=True)


@dataclass(frozen=True, slots=True)
class Update(Generic[OutputT_co]):
    """What `train_updates` yields: one update of one optimizer.

    Args:
        optimizer: The name of the optimizer that steps.
        loss: Scalar, the mean over the batch's items, or their sum. Its gradients are computed for the parameters of
            that optimizer alone.
        outputs: What metrics and callbacks need, given by one update of a step.
        logged: As for `StepOutput`.
        is_sum: Whether `loss` is a sum over the batch's items.
    """

    optimizer: str
    loss: Tensor
    outputs: OutputT_co | None = None
    logged: Mapping[str, Tensor] = field(default_factory=dict)
    is_sum: bool = False

    def as_output(self) -> StepOutput[OutputT_co]:
        """Return loss, outputs and logged values as those of a step."""
        return StepOutput(self.loss, cast(OutputT_co, self.outputs), self.logged, self.is_sum)


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The result of one evaluation, the same on every process.

    Args:
        loss: Mean over all items of the data, each counted once.
        metrics: Values of the metrics by name, and means of what `eval_step` logged.
    """

    loss: float
    metrics: Mapping[str, float]

    def values(self, prefix: str = "") -> dict[str, float]:
        """Return the results by the names that monitors use.

        They are `eval_loss` and the metrics' names, or `<prefix>/loss` and `<prefix>/<metric>`.

        Args:
            prefix: The name of the evaluation set, empty for a single set without a name.

        Example:
            >>> EvalResult(loss=0.5, metrics={"accuracy": 0.9}).values()
            {'eval_loss': 0.5, 'accuracy': 0.9}
            >>> EvalResult(loss=0.5, metrics={"accuracy": 0.9}).values("test")
            {'test/loss': 0.5, 'test/accuracy': 0.9}
        """
        if not prefix:
            return {"eval_loss": self.loss, **self.metrics}
        return {f"{prefix}/loss": self.loss} | {f"{prefix}/{name}": value for name, value in self.metrics.items()}


# ---- what a run reports


@dataclass(frozen=True, slots=True)
class StepRecord:
    """The record of one optimizer step.

    Args:
        step: The number of this step, counted from 1.
        epoch: The number of its epoch, counted from 1.
        loss: Mean over all items of the step: all its batches, all processes.
        learning_rate: Learning rate of the first parameter group, as used by this step; NaN if the optimizer has none.
        items: Number of items of the step.
        logged: Further values by name, such as `grad_norm` and those of `StepOutput.logged`.
    """

    step: int
    epoch: int
    loss: float
    learning_rate: float
    items: float
    logged: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """The record of one evaluation of one set within a run.

    Args:
        step: Optimizer steps completed before it.
        epoch: The number of the epoch that it is in, counted from 1.
        name: The name of the set, empty for a single set without a name.
        loss: Mean over all items of the set.
        metrics: Values of the metrics by name, and means of what `eval_step` logged.
    """

    step: int
    epoch: int
    name: str
    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ValuesRecord:
    """What a run reported at one step: see `Callback.on_values`.

    Args:
        step: Optimizer steps completed.
        epoch: The number of the epoch, counted from 1.
        values: The values by name.
    """

    step: int
    epoch: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The record of one epoch and its evaluations.

    Args:
        epoch: The number of this epoch, counted from 1.
        step: Optimizer steps completed at its end.
        train_loss: Mean over all items trained on in this epoch.
        items: Number of items trained on in this epoch.
        seconds: Duration of the epoch, including its evaluations.
        learning_rate: Learning rate of the first parameter group at the epoch's last step; NaN if the optimizer has
            none.
        is_complete: False if the run ended within the epoch.
        evaluations: The last evaluation of each set in this epoch, by name (`""` for a single set without a name).
        logged: Means over the steps of what hooks logged, such as `grad_norm`.
        train_metrics: Metrics over the training batches, and means over the steps of what `train_step` logged.
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
        """Loss of the single evaluation set without a name, None if it was not evaluated in this epoch."""
        result = self.evaluations.get("")
        return None if result is None else result.loss

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the single evaluation set without a name, empty if it was not evaluated in this epoch."""
        result = self.evaluations.get("")
        return {} if result is None else result.metrics

    def values(self) -> dict[str, float]:
        """Return every value of the epoch by the name that monitors use."""
        values = {"train_loss": self.train_loss, "learning_rate": self.learning_rate}
        values |= self.logged
        values |= {f"train/{name}": value for name, value in self.train_metrics.items()}
        for name, result in self.evaluations.items():
            values |= result.values(name)
        return values

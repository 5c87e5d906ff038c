"""Metrics."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field

import torch
from torch import nn
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.batch_hooks import BatchMixin
from ptacc.errors import DataError, OptionError
from ptacc.metrics.aggregation import (
    MetricStates,
    compute,
    started,
)
from ptacc.run.state import StateKey
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import StepOutput
from ptacc.types.protocols import MetricLike
from ptacc.validation import value_text

TRAIN_METRICS: StateKey[MetricStates] = StateKey("train_metrics", each_rank=True)
RESERVED = frozenset({"loss", "eval_loss", "train_loss", "learning_rate"})


class MetricsMixin(BatchMixin[BatchT, OutputT]):
    """Computes metrics over evaluations, and over the training batches of an epoch where asked to.

    States live on the device, and torchmetrics puts the processes' states together when it computes; every sample
    counts once. An object of one's own knows nothing of other processes: there, each process keeps what its metric
    was given, on the host, and when the value is computed every process takes in what all were given, batch by batch.
    For outputs too large for that, derive the metric from `torchmetrics.Metric`.

    Options:
        metrics: Metrics of evaluations by name: torchmetrics, collections of them, or objects of one's own with
            `update`, `compute` and `reset`. A metric that computes several values reports `name/key`.
        train_metrics: Metrics over the training batches of each epoch, reported as `train/name`.

    Hooks: `update_metrics`, `on_run_start`, `on_eval_batch_end`, `on_batch_end`, `on_evaluation_start`,
    `on_epoch_start`, `compute_metrics`, `compute_train_metrics`, `eval_value_names`, `train_value_names`.

    Combines with: everything. The default `update_metrics` is for batches `(inputs, targets)`.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> from ptacc import MetricsMixin, Trainer
        >>> class MyTrainer(MetricsMixin, Trainer): ...
    """

    metrics: Mapping[str, MetricLike] = field(default_factory=dict)
    train_metrics: Mapping[str, MetricLike] = field(default_factory=dict)
    _evaluated: Mapping[str, MetricLike] = field(init=False, default_factory=dict)
    _trained: Mapping[str, MetricLike] = field(init=False, default_factory=dict)

    @override
    def check_options(self) -> None:
        """Refuse names that collide and metrics in two sets."""
        owner = type(self).__name__
        for option, metrics in (("metrics", self.metrics), ("train_metrics", self.train_metrics)):
            check_metrics(owner, option, metrics)
        check_names(owner, self.metrics)
        everyone = [*self.metrics.values(), *self.train_metrics.values()]
        if len({id(metric) for metric in everyone}) < len(everyone):
            twice = next(metric for metric in everyone if sum(metric is other for other in everyone) > 1)
            raise OptionError(
                f"{owner}: one {type(twice).__name__} is given twice, and its state would mix what both see. "
                "Give each place its own: metric.clone()."
            )

    @hook("default")
    def update_metrics(self, batch: BatchT, output: StepOutput[OutputT], metrics: Iterable[MetricLike]) -> None:
        """Take one batch into `metrics`: by default, the outputs and the targets of a batch `(inputs, targets)`.

        Args:
            batch: The batch, on the device.
            output: What the step put out.
            metrics: Those of the evaluation, or those of training.

        Raises:
            DataError: The batch is no pair; override this to say what predictions and targets are.
        """
        if not (isinstance(batch, Sequence) and len(batch) == 2):
            raise DataError(
                f"{type(self).__name__}.update_metrics: a batch is a {type(batch).__name__}, and not a pair (inputs, "
                "targets). Override update_metrics(self, batch, output, metrics) to say what the metrics take."
            )
        for metric in metrics:
            metric.update(output.outputs, batch[1])

    @override
    def on_run_start(self) -> None:
        """Leave the user's own metrics alone in an isolated copy."""
        super().on_run_start()
        if self.is_isolated:
            self.metrics, self.train_metrics = copy.deepcopy((self.metrics, self.train_metrics))

    @override
    def on_eval_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Update the evaluation's metrics."""
        super().on_eval_batch_end(batch, output)
        self.update_metrics(batch, output, self._evaluated.values())

    @override
    def on_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Update the metrics of training."""
        super().on_batch_end(batch, output)
        if self.train_metrics:
            with torch.no_grad():
                self.update_metrics(batch, output, self._trained.values())

    @override
    def on_evaluation_start(self, name: str) -> None:
        """Reset the evaluation's metrics."""
        super().on_evaluation_start(name)
        self._evaluated = started(self.metrics, self.device, self._distributed)

    @override
    def on_epoch_start(self) -> None:
        """Reset the metrics of training."""
        super().on_epoch_start()
        self._trained = started(self.train_metrics, self.device, self._distributed)
        if self._trained:
            self.run[TRAIN_METRICS] = MetricStates(self._trained)

    @override
    def compute_metrics(self) -> dict[str, float]:
        """Compute the evaluation's metrics over all processes."""
        return super().compute_metrics() | compute(self._evaluated, self._distributed)

    @override
    def compute_train_metrics(self) -> dict[str, float]:
        """Compute the metrics of training over all processes."""
        return super().compute_train_metrics() | compute(self._trained, self._distributed)

    @override
    def eval_value_names(self) -> frozenset[str]:
        """Report the metrics of evaluations."""
        return super().eval_value_names() | list_metric_names(self.metrics)

    @override
    def train_value_names(self) -> frozenset[str]:
        """Report the metrics of training."""
        return super().train_value_names() | {f"train/{name}" for name in list_metric_names(self.train_metrics)}


def check_metrics(owner: str, option: str, metrics: object) -> None:
    """Raise `OptionError` for what is no mapping of names to metrics."""
    if not isinstance(metrics, Mapping | nn.ModuleDict):
        raise OptionError(
            f"{owner}({option}={value_text(metrics)}): must be a mapping from names to metrics: "
            f'{option}={{"accuracy": MulticlassAccuracy(10)}}.'
        )
    for name, metric in metrics.items():
        if isinstance(metric, type) or not all(hasattr(metric, method) for method in ("update", "compute", "reset")):
            raise OptionError(
                f"{owner}({option}={{{name!r}: {value_text(metric)}}}): must be a metric: an instance, with update, "
                "compute and reset."
            )


def check_names(owner: str, metrics: Mapping[str, MetricLike]) -> None:
    """Raise `OptionError` for names of metrics that something else is called by, or that collide once spelt out."""
    if taken := RESERVED & metrics.keys():
        raise OptionError(
            f"{owner}(metrics={{{min(taken)!r}: ...}}): every run reports a value of this name already. "
            "Give the metric another name."
        )
    seen: set[str] = set()
    for name, metric in metrics.items():
        spelt = list_metric_names({name: metric})
        if seen & spelt:
            raise OptionError(
                f"{owner}(metrics=...): two metrics report {min(seen & spelt)!r}, one of them in a collection. "
                "Give one of them another name."
            )
        seen |= spelt


def list_metric_names(metrics: Mapping[str, MetricLike]) -> frozenset[str]:
    """Return the names under which metrics are reported: `name/key` for each metric of a collection."""
    names: set[str] = set()
    for name, metric in metrics.items():
        names |= {f"{name}/{key}" for key in metric} if isinstance(metric, nn.ModuleDict) else {name}
    return frozenset(names)

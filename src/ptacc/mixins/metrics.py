"""Metrics."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field

import torch
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.batch_hooks import BatchMixin
from ptacc.errors import DataError
from ptacc.metrics.aggregation import compute_metrics, prepare_metrics
from ptacc.metrics.names import check_metrics, check_names, list_metric_names
from ptacc.metrics.state import MetricStates
from ptacc.run.state import StateKey
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import StepOutput
from ptacc.types.protocols import MetricLike

TRAIN_METRICS: StateKey[MetricStates] = StateKey("train_metrics", each_rank=True)


class MetricsMixin(BatchMixin[BatchT, OutputT]):
    """Computes metrics over evaluations and, optionally, over the training batches of each epoch.

    Every sample counts once. Metric states are on the device of the model, and torchmetrics synchronises them across
    ranks when it computes. An object of your own that is not a torchmetrics metric gets the batches of all ranks: they
    are kept on the host and gathered when the value is computed. If outputs are too large for that, derive the metric
    from `torchmetrics.Metric`.

    Options:
        metrics: Metrics of evaluations by name: metrics and collections of torchmetrics, or objects with `update`,
            `compute` and `reset`. A metric with several values reports `name/key`.
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
    _eval_metrics: Mapping[str, MetricLike] = field(init=False, default_factory=dict)
    _epoch_metrics: Mapping[str, MetricLike] = field(init=False, default_factory=dict)

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        check_metrics(owner, {"metrics": self.metrics, "train_metrics": self.train_metrics})
        check_names(owner, self.metrics)

    @hook("default")
    def update_metrics(self, batch: BatchT, output: StepOutput[OutputT], metrics: Iterable[MetricLike]) -> None:
        """Update metrics with one batch. A default hook: it calls `metric.update(outputs, targets)`.

        Args:
            batch: The batch, on the device.
            output: What the step returned.
            metrics: The metrics of the evaluation, or those of training.

        Raises:
            DataError: The batch is not a pair `(inputs, targets)`. Override this hook for other batches.
        """
        if not (isinstance(batch, Sequence) and len(batch) == 2):
            raise DataError(
                f"{type(self).__name__}.update_metrics: a batch is a {type(batch).__name__}, and not a pair (inputs, "
                "targets). Override update_metrics(self, batch, output, metrics) to pass the metrics what they need."
            )
        for metric in metrics:
            metric.update(output.outputs, batch[1])

    @override
    def on_eval_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        super().on_eval_batch_end(batch, output)
        self.update_metrics(batch, output, self._eval_metrics.values())

    @override
    def on_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        super().on_batch_end(batch, output)
        if self.train_metrics:
            with torch.no_grad():
                self.update_metrics(batch, output, self._epoch_metrics.values())

    @override
    def on_evaluation_start(self, name: str) -> None:
        super().on_evaluation_start(name)
        self._eval_metrics = prepare_metrics(self.metrics, self.device, self._distributed)

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        if self.is_isolated:
            self.metrics, self.train_metrics = copy.deepcopy((self.metrics, self.train_metrics))
        self._epoch_metrics = prepare_metrics(self.train_metrics, self.device, self._distributed)
        if self._epoch_metrics:
            self.run[TRAIN_METRICS] = MetricStates(self._epoch_metrics)

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        for metric in self._epoch_metrics.values():
            metric.reset()

    @override
    def compute_metrics(self) -> dict[str, float]:
        return super().compute_metrics() | compute_metrics(self._eval_metrics, self._distributed)

    @override
    def compute_train_metrics(self) -> dict[str, float]:
        return super().compute_train_metrics() | compute_metrics(self._epoch_metrics, self._distributed)

    @override
    def eval_value_names(self) -> frozenset[str]:
        return super().eval_value_names() | list_metric_names(self.metrics)

    @override
    def train_value_names(self) -> frozenset[str]:
        return super().train_value_names() | {f"train/{name}" for name in list_metric_names(self.train_metrics)}

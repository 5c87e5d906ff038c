"""Resuming a run whose training metrics are others than those of the saved run."""

from pathlib import Path
from typing import Any

import pytest
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from ptacc import CheckpointMixin, MetricsMixin, RunHistory, Trainer
from ptacc.errors import CheckpointError
from ptacc.testing import tiny_data, tiny_parts


class WithMetrics(CheckpointMixin, MetricsMixin, Trainer): ...


def train(directory: Path, metrics: dict[str, Any], steps: int, ignored: set[str] | None = None) -> RunHistory:
    options: dict[str, Any] = {"checkpoint_dir": directory, "resume": True, "resume_ignore": ignored or set()}
    trainer = WithMetrics(**tiny_parts(), train_metrics=metrics, **options)
    return trainer.train(tiny_data(), max_steps=steps, per_device_batch_size=4)  # an epoch has 6 steps


def test_metrics_added_within_an_epoch_are_a_difference_that_can_be_ignored(tmp_path: Path) -> None:
    train(tmp_path, {"accuracy": MulticlassAccuracy(2)}, steps=4)
    metrics = {"f1": MulticlassF1Score(2)}
    with pytest.raises(CheckpointError, match=r"(?s)\['accuracy'\], and the run \['f1'\].*ignore=\{'train_metrics'\}"):
        train(tmp_path, metrics, steps=6)
    history = train(tmp_path, metrics, steps=6, ignored={"train_metrics"})
    assert history[-1].step == 6
    assert history[-1].train_metrics.keys() == {"f1"}


def test_metrics_may_change_between_epochs(tmp_path: Path) -> None:
    train(tmp_path, {"accuracy": MulticlassAccuracy(2)}, steps=6)
    assert train(tmp_path, {"f1": MulticlassF1Score(2)}, steps=12)[-1].train_metrics.keys() == {"f1"}

"""The metrics that classification and segmentation report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from ptacc.errors import OptionError
from ptacc.mixins.metrics import MetricsMixin
from ptacc.types.protocols import MetricLike

Average: TypeAlias = Literal["micro", "macro", "none"]


def make_accuracies(
    num_classes: int, top_k: Sequence[int] = (), *, per_class: bool = False, ignore_index: int | None = None
) -> dict[str, MetricLike]:
    """Return `accuracy`, and the accuracies among the `k` most probable classes and of each class, by name.

    Example:
        >>> list(make_accuracies(10, [5], per_class=True))
        ['accuracy', 'top5_accuracy', 'class_accuracy']
    """
    from torchmetrics.classification import MulticlassAccuracy

    if wrong := [k for k in top_k if not 1 <= k <= num_classes]:
        raise OptionError(f"top_k={wrong[0]}: must be from 1 to num_classes={num_classes}.")

    def make(average: Average, k: int = 1) -> MetricLike:
        return MulticlassAccuracy(num_classes, k, average=average, ignore_index=ignore_index, validate_args=False)

    metrics = {"accuracy": make("micro")} | {f"top{k}_accuracy": make("micro", k) for k in top_k}
    return {**metrics, "class_accuracy": make("none")} if per_class else metrics


def add_metrics(trainer: MetricsMixin[Any, Any], ready: Mapping[str, MetricLike]) -> None:
    """Add metrics of a ready trainer to those that it was given, which replace them."""
    trainer.metrics = {**ready, **trainer.metrics}

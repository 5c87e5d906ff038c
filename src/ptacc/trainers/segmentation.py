"""Segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Generic

from torch import Tensor, nn
from typing_extensions import override

from ptacc.mixins.metrics import MetricsMixin
from ptacc.trainers.class_metrics import Average, add_metrics, make_accuracies
from ptacc.trainers.supervised import Trainer
from ptacc.types.aliases import ModelT, Pair
from ptacc.types.protocols import MetricLike
from ptacc.validation import check_at_least


class SegmentationTrainer(MetricsMixin[Pair, Tensor], Trainer[ModelT], Generic[ModelT]):
    """Trains on images and a class index for each pixel `(items, height, width)`.

    The model's logits are `(items, classes, height, width)`. The items of the loss are pixels that it does not ignore,
    times the weights of their classes: losses are exact for images with different numbers of labelled pixels. Other
    shapes work too: `(items, length)` for sequences, `(items, depth, height, width)` for volumes.

    Options:
        num_classes: The number of classes.
        loss_func: By default `nn.CrossEntropyLoss()`, which ignores pixels with the target -100. For others, give
            `nn.CrossEntropyLoss(ignore_index=255)`, or a function, as `partial(cross_entropy, ignore_index=255)`. The
            metrics ignore the same pixels.
        per_class_iou: Whether to report `class_iou/0` and so on.

    Evaluations report `mean_iou`, the mean over classes of intersection over union, and `accuracy`, the share of pixels
    that are classified correctly. A class that is neither in the targets nor predicted does not count in the mean.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from ptacc.trainers import SegmentationTrainer
        >>> images = torch.rand(64, 1, 4, 4)
        >>> data = TensorDataset(images, (images[:, 0] > 0.5).long())
        >>> model = nn.Conv2d(1, 2, kernel_size=1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        >>> trainer = SegmentationTrainer(model, optimizer=optimizer, num_classes=2, default_callbacks=())
        >>> history = trainer.train(data, data, num_epochs=20)
        >>> history[-1].metrics["mean_iou"] > 0.8
        True
    """

    num_classes: int
    loss_func: Callable[[Tensor, Tensor], Tensor] = field(default_factory=nn.CrossEntropyLoss)
    per_class_iou: bool = False

    @override
    def check_options(self) -> None:
        check_at_least(type(self).__name__, "num_classes", self.num_classes, 2)
        ignored = self._loss_items.ignored
        add_metrics(self, make_pixel_metrics(self.num_classes, ignored, per_class=self.per_class_iou))


def make_pixel_metrics(num_classes: int, ignored: int, *, per_class: bool) -> dict[str, MetricLike]:
    """Return `accuracy` and `mean_iou`, and `class_iou` by option."""
    from torchmetrics.classification import MulticlassJaccardIndex

    def make(average: Average) -> MetricLike:
        return MulticlassJaccardIndex(num_classes, average=average, ignore_index=ignored, validate_args=False)

    metrics = make_accuracies(num_classes, ignore_index=ignored) | {"mean_iou": make("macro")}
    return {**metrics, "class_iou": make("none")} if per_class else metrics

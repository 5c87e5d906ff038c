"""Classification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from typing import Any, Generic, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from ptacc.core.callback import overrides
from ptacc.errors import DataError, LossError, OptionError
from ptacc.mixins.metrics import MetricsMixin
from ptacc.mixins.mixup import MixUpMixin
from ptacc.trainers.class_metrics import add_metrics, make_accuracies
from ptacc.trainers.loss_items import LossItems
from ptacc.trainers.supervised import Trainer, check_mean
from ptacc.types.aliases import ModelT, Pair
from ptacc.types.outputs import StepOutput
from ptacc.types.protocols import MetricLike
from ptacc.validation import check_at_least


class ClassificationTrainer(MixUpMixin[Tensor], MetricsMixin[Pair, Tensor], Trainer[ModelT], Generic[ModelT]):
    """Trains a classifier on inputs `(items, ...)` and class indices `(items,)`; its logits are `(items, classes)`.

    It has the options of `MetricsMixin` and `MixUpMixin`, and those of `Trainer`. Label smoothing and mixing are for
    training only. Training and evaluation losses are exact means with class weights too, also of mixed batches: there,
    each sample has its share of the weight of its own class and of that of the other sample. Targets may be
    probabilities `(items, classes)`. A loss with a `forward` of its own, such as a focal loss, is called as it is.

    Options:
        num_classes: The number of classes.
        loss_func: By default `nn.CrossEntropyLoss()`. For class weights, `nn.CrossEntropyLoss(weight=...)`.
        label_smoothing: Share of each training target that is distributed over all classes, from 0 to 1.
        top_k: Reports `top5_accuracy` for 5: the share of samples whose class is among the 5 most probable ones.
        per_class_accuracy: Whether to report `class_accuracy/0` and so on: the accuracy among samples of each class.

    Evaluations report `accuracy`. Samples whose class the loss ignores do not count in it, nor in the other accuracies.
    A metric of yours in `metrics` replaces one of the same name.

    Example:
        >>> from ptacc.testing import iris_parts, iris_split
        >>> from ptacc.trainers import ClassificationTrainer
        >>> train, test = iris_split()
        >>> trainer = ClassificationTrainer(**iris_parts(), num_classes=3, label_smoothing=0.1, mixup_alpha=0.2)
        >>> history = trainer.train(train, num_epochs=20)
        >>> trainer.evaluate(test).metrics["accuracy"] > 0.9
        True
    """

    num_classes: int
    loss_func: Callable[[Tensor, Tensor], Tensor] = field(default_factory=nn.CrossEntropyLoss)
    label_smoothing: float = 0.0
    top_k: Sequence[int] = ()
    per_class_accuracy: bool = False

    @override
    def check_options(self) -> None:
        check_training_targets(self, self._loss_items)
        check_mean(self, self._loss_items, ClassificationTrainer)
        classes, ignored = self.num_classes, self._loss_items.ignored
        add_metrics(self, make_accuracies(classes, self.top_k, per_class=self.per_class_accuracy, ignore_index=ignored))

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.dim() < 2 or outputs.shape[1] != self.num_classes:
            raise LossError(
                f"{type(self).__name__}(num_classes={self.num_classes}): the model's outputs have the shape "
                f"{tuple(outputs.shape)}, and must be (items, {self.num_classes})."
            )
        loss = self.loss_func
        if not is_cross_entropy(loss):
            return loss(outputs, targets)
        return compute_cross_entropy(outputs, targets, loss, self.label_smoothing or loss.label_smoothing)

    @override
    def count_items(self, batch: Pair) -> float:
        return super().count_items(batch)  # also for the loss of training, and for mixed batches

    @override
    def _items_are_samples(self, batch: Pair) -> bool:
        return not overrides(self, ClassificationTrainer, "count_items") and self._loss_items.are_samples(batch)

    @override
    def update_metrics(self, batch: Pair, output: StepOutput[Tensor], metrics: Iterable[MetricLike]) -> None:
        inputs, targets = batch
        classes = targets.argmax(dim=1) if targets.is_floating_point() else targets
        super().update_metrics((inputs, classes), output, metrics)

    @override
    def check_batch(self, batch: Any) -> None:
        super().check_batch(batch)
        check_class_targets(type(self).__name__, batch[1], is_weighted=self._loss_items.is_selective)


def check_training_targets(trainer: ClassificationTrainer, items: LossItems) -> None:
    """Raise `OptionError` for options of the targets in training that do not fit, and set `mixup_classes`."""
    owner, loss, smoothing = type(trainer).__name__, trainer.loss_func, trainer.label_smoothing
    check_at_least(owner, "num_classes", trainer.num_classes, 2)
    if trainer.mixup_classes not in (None, trainer.num_classes):
        raise OptionError(f"{owner}(mixup_classes={trainer.mixup_classes}): leave it out, it is num_classes here.")
    if not 0 <= smoothing <= 1:
        raise OptionError(f"{owner}(label_smoothing={smoothing!r}): must be a share, from 0 to 1.")
    if smoothing and not is_cross_entropy(loss):
        raise OptionError(
            f"{owner}(label_smoothing={smoothing}): smooths the targets of nn.CrossEntropyLoss, whose forward "
            "loss_func must have. Leave it out, and override compute_train_loss for another loss of training."
        )
    is_mixed = trainer.mixup_alpha is not None or trainer.cutmix_alpha is not None
    if is_mixed and items.ignored >= 0:
        raise OptionError(
            f"{owner}: mixup_alpha and cutmix_alpha mix all samples, and loss_func ignores those of class "
            f"{items.ignored}. Leave them out of the dataset."
        )
    if is_mixed and items.is_selective and not is_cross_entropy(loss):
        raise OptionError(
            f"{owner}: mixup_alpha and cutmix_alpha mix the weights of classes too, which needs "
            "loss_func=nn.CrossEntropyLoss(weight=...)."
        )
    trainer.mixup_classes = trainer.num_classes


def is_cross_entropy(loss: object) -> TypeGuard[nn.CrossEntropyLoss]:
    """Return whether a loss computes what torch's cross-entropy does, and not with a `forward` of its own."""
    return isinstance(loss, nn.CrossEntropyLoss) and type(loss).forward is nn.CrossEntropyLoss.forward


def check_class_targets(owner: str, targets: Tensor, *, is_weighted: bool) -> None:
    """Raise `DataError` unless the targets of a batch are class indices, or probabilities without class weights."""
    if targets.dtype == torch.int64 and targets.dim() == 1:
        return
    if not (targets.is_floating_point() and targets.dim() == 2):
        raise DataError(
            f"{owner}: the targets are {targets.dtype} of the shape {tuple(targets.shape)}, and must be class indices, "
            "torch.int64 of the shape (items,), or probabilities (items, classes). For a class per pixel, use "
            "SegmentationTrainer."
        )
    if is_weighted:
        raise DataError(
            f"{owner}: loss_func gives classes weights, and the targets are probabilities. Give class indices, which "
            "mixup_alpha and label_smoothing take too, or leave the weights out."
        )


def compute_cross_entropy(outputs: Tensor, targets: Tensor, loss: nn.CrossEntropyLoss, smoothing: float) -> Tensor:
    """Return the loss of training: a mean over samples, or over the weights of the samples that were mixed.

    torch divides the weighted loss of probabilities by the number of samples. A batch is mixed with itself, so that the
    sum of its weights is that from before mixing.
    """
    if not targets.is_floating_point():
        return cross_entropy(outputs, targets, loss.weight, ignore_index=loss.ignore_index, label_smoothing=smoothing)
    targets = targets.to(outputs.dtype)
    mean = cross_entropy(outputs, targets, loss.weight, label_smoothing=smoothing)
    return mean if loss.weight is None else mean * len(targets) / (targets @ loss.weight).sum()

"""Trainers of models of transformers: any model that computes its loss, and classifiers of sequences."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Iterable, Mapping
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.callback import overrides
from ptacc.errors import DataError, ModelError, OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.mixins.metrics import MetricsMixin
from ptacc.model.caching import caches_disabled
from ptacc.trainers.supervised import describe
from ptacc.types.aliases import ModelT
from ptacc.types.outputs import StepOutput
from ptacc.types.protocols import MetricLike
from ptacc.validation import value_text

IGNORED = -100
"""The label that losses of torch and transformers leave out of their means."""
PIXEL_OPTIONS = ("semantic_loss_ignore_index", "loss_ignore_index")
"""Entries of a model's config with the label of pixels that its loss leaves out. Its head for images ignores -100."""


class HFTrainer(
    MetricsMixin[Mapping[str, Any], Tensor], TrainingLoop[Mapping[str, Any], Tensor, ModelT], Generic[ModelT]
):
    """Trains a model that takes a batch's entries as keywords, and returns `loss` and `logits`.

    Models of transformers with a head for a task do so. A batch is a dictionary or a `BatchEncoding` with `labels`, as
    collators of transformers make it. The loss is the model's own, a mean over the labels that are not -100. With
    classes of pixels, it is one over those that are not `config.semantic_loss_ignore_index`; with floats, over all; and
    for CTC, over samples, which needs `config.ctc_loss_reduction="mean"`. If that of your model is a mean over
    something else, override `count_items`. The cache of keys and values is off in training, evaluation and prediction:
    with it, packed sequences would attend to each other.

    Options:
        label_smoothing: Share of the loss, in training only, that is the mean over all classes instead of the loss of
            the label: from 0 to 1. For losses that are a cross-entropy of `logits` `(..., classes)`.

    Hooks: `get_targets`.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=20, **sizes))
        >>> data = [{"input_ids": torch.tensor([2, 5, 3]), "labels": index % 2} for index in range(8)]
        >>> trainer = HFTrainer(model, optimizer=torch.optim.AdamW(model.parameters()), default_callbacks=())
        >>> trainer.train(data, num_epochs=1, per_device_batch_size=4)[-1].step
        2
    """

    label_smoothing: float = 0.0

    @override
    def check_options(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise OptionError(
                f"{type(self).__name__}(label_smoothing={value_text(self.label_smoothing)}): must be from 0 to 1."
            )

    @hook("default")
    def get_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what `logits` predict, at each place: -100 where nothing is. A default hook: `batch["labels"]`."""
        return require_labels(type(self).__name__, batch)

    @override
    def count_items(self, batch: Mapping[str, Any]) -> float:
        return int(select_items(self.unwrapped_model, self.get_targets(batch)).sum())

    @override
    def check_batch(self, batch: Any) -> None:
        owner = type(self).__name__
        labels = require_labels(owner, batch)
        if not overrides(self, HFTrainer, "train_step"):
            check_ctc(owner, self.unwrapped_model, labels)
        if labels.is_floating_point() and self.label_smoothing:
            raise DataError(
                f"{owner}(label_smoothing={self.label_smoothing:g}): the labels must be classes, not floats."
            )
        check_keys(owner, type(self.unwrapped_model), batch)

    @override
    def train_step(self, batch: Mapping[str, Any]) -> StepOutput[Tensor]:
        return self._compute_output(batch, self.label_smoothing)

    @override
    def eval_step(self, batch: Mapping[str, Any]) -> StepOutput[Tensor]:
        return self._compute_output(batch, 0.0)

    @override
    def predict_step(self, batch: Mapping[str, Any]) -> Any:
        """Compute the logits of a batch, which may have no `labels`."""
        return self.model(**{name: value for name, value in batch.items() if name != "labels"}).logits

    def _compute_output(self, batch: Mapping[str, Any], label_smoothing: float) -> StepOutput[Tensor]:
        output: Any = self.model(**batch)
        logits: Tensor | None = getattr(output, "logits", None)
        loss: Tensor | None = getattr(output, "loss", None)
        if loss is None or logits is None:
            raise ModelError(
                f"{type(self).__name__}: the model returned {describe(output)}, and must return an object with `loss` "
                "and `logits`. Use a class of transformers with a head for the task, with config.return_dict=True."
            )
        if label_smoothing:
            targets = self.get_targets(batch).flatten()
            uniform = cross_entropy(logits.float().flatten(0, -2), targets, label_smoothing=1.0)
            loss = loss.lerp(uniform, label_smoothing)
        return StepOutput(loss, logits)

    @override
    def update_metrics(
        self, batch: Mapping[str, Any], output: StepOutput[Tensor], metrics: Iterable[MetricLike]
    ) -> None:
        """Update metrics with `(logits, targets)`. A default hook."""
        for metric in metrics:
            metric.update(output.outputs, self.get_targets(batch))

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        with super().around_run(), caches_disabled(self.unwrapped_model):
            yield

    @override
    @contextlib.contextmanager
    def around_evaluation(self) -> Generator[None]:
        with super().around_evaluation(), caches_disabled(self.unwrapped_model):
            yield

    @override
    @contextlib.contextmanager
    def around_prediction(self) -> Generator[None]:
        with super().around_prediction(), caches_disabled(self.unwrapped_model):
            yield


class SequenceClassificationTrainer(HFTrainer[ModelT], Generic[ModelT]):
    """Trains a model that gives each sample, such as a sequence or an image, one class, several, or a number.

    The model decides by `config.problem_type`, or else by the labels: classes `(samples,)`; floats of 0 and 1
    `(samples, classes)` for several classes at once; floats `(samples,)` for a number, with `num_labels=1`. Metrics get
    `(logits, labels)`: labels of several classes as integers, and numbers in the shape of the labels.

    Example:
        >>> from transformers import BertForSequenceClassification
        >>> class Classifier(SequenceClassificationTrainer[BertForSequenceClassification]):
        ...     label_smoothing: float = 0.1
    """

    @override
    def update_metrics(
        self, batch: Mapping[str, Any], output: StepOutput[Tensor], metrics: Iterable[MetricLike]
    ) -> None:
        """Update metrics with `(logits, labels)`. A default hook."""
        logits, labels = output.outputs, self.get_targets(batch)
        config: Any = getattr(self.unwrapped_model, "config", None)
        if getattr(config, "problem_type", None) == "multi_label_classification":
            labels = labels.long()
        elif labels.is_floating_point():
            logits = logits.view_as(labels)
        for metric in metrics:
            metric.update(logits, labels)


def require_labels(owner: str, batch: object) -> Tensor:
    """Return the labels of a batch, or raise `DataError`."""
    labels: object = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise DataError(
            f'{owner} trains on dictionaries of tensors with "labels", and the data gives {describe(batch)}. Give a '
            "collate_fn that makes them, such as DataCollatorWithPadding(tokenizer)."
        )
    return labels


def select_items(model: nn.Module, labels: Tensor) -> Tensor:
    """Return a mask of the labels that the loss of a model of transformers is a mean over; for CTC, of the samples."""
    config: object = getattr(model, "config", None)
    if is_ctc(config, labels):  # torch divides the loss of each sample by the number of its labels
        return labels.new_ones(len(labels), dtype=torch.bool)
    has_pixels = labels.dim() > 2
    if labels.is_floating_point() or (has_pixels and getattr(config, "num_labels", None) == 1):
        return torch.ones_like(labels, dtype=torch.bool)
    own = [getattr(config, name) for name in PIXEL_OPTIONS if has_pixels and hasattr(config, name)]
    return labels != (own[0] if own else IGNORED)


def is_ctc(config: object, labels: Tensor) -> bool:
    """Return whether a model aligns labels `(samples, length)`. Classifiers of sounds have the same config."""
    return labels.dim() == 2 and not labels.is_floating_point() and hasattr(config, "ctc_loss_reduction")


def check_ctc(owner: str, model: nn.Module, labels: Tensor) -> None:
    """Raise `ModelError` for a model whose CTC loss is not a mean."""
    config: Any = getattr(model, "config", None)
    if is_ctc(config, labels) and config.ctc_loss_reduction != "mean":
        raise ModelError(
            f"{owner}: the model has config.ctc_loss_reduction={config.ctc_loss_reduction!r}, and the loss must be a "
            'mean over the batch: set `model.config.ctc_loss_reduction = "mean"`.'
        )


def check_keys(owner: str, model: type[nn.Module], batch: Mapping[str, Any]) -> None:
    """Raise `DataError` for entries of a batch that `forward` of a model does not take."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    if unknown := batch.keys() - {parameter.name for parameter in parameters}:
        raise DataError(
            f"{owner}: {model.__name__}.forward does not take the entry {min(unknown)!r} of the batches. Leave it "
            f'out of the samples: dataset.remove_columns(["{min(unknown)}"]).'
        )

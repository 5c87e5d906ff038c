"""Supervised training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, Generic

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.callback import overrides
from ptacc.errors import DataError, LossError, OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.trainers.loss_items import LossItems
from ptacc.types.aliases import ModelT, Pair, PairSample
from ptacc.types.outputs import StepOutput


class Trainer(TrainingLoop[Pair, Tensor, ModelT, PairSample], Generic[ModelT]):
    """Trains a model on batches `(inputs, targets)` with a loss function of its outputs and the targets.

    Options:
        loss_func: Returns the mean loss of a batch, a scalar, from `(outputs, targets)`. The items of torch's
            cross-entropy and negative log-likelihood are the targets that are not ignored, times the weights of their
            classes. This holds for classes that inherit `forward` from them. The items of other losses are samples.

    Hooks: `compute_train_loss` and `compute_eval_loss`. They are separate, so that label smoothing or mixup in training
    does not affect evaluation.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = Trainer(model, loss_func=nn.MSELoss(), optimizer=optimizer, default_callbacks=())
        >>> history = trainer.train(data, num_epochs=3, per_device_batch_size=16)
        >>> history[-1].train_loss < history[0].train_loss
        True
    """

    loss_func: Callable[[Tensor, Tensor], Tensor]
    _known_loss: LossItems | None = field(init=False, default=None)
    _checks_shapes: bool = field(init=False, default=False)  # until a batch had several samples

    @override
    def check_options(self) -> None:
        if isinstance(self.loss_func, type) or not callable(self.loss_func):
            raise OptionError(
                f"{type(self).__name__}(loss_func={self.loss_func!r}): must be a function of (outputs, targets), "
                "such as nn.CrossEntropyLoss()."
            )
        check_mean(self, self._loss_items)

    @hook("default")
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a training batch, a scalar. A default hook: `loss_func(outputs, targets)`."""
        if self._checks_shapes:
            self._check_shapes(outputs, targets)
        return self.loss_func(outputs, targets)

    @hook("default")
    def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of an evaluation batch, a scalar. A default hook: `loss_func(outputs, targets)`."""
        if self._checks_shapes:
            self._check_shapes(outputs, targets)
        return self.loss_func(outputs, targets)

    @override
    def count_items(self, batch: Pair) -> float:
        """Return the number of items that the loss of a batch is a mean over. A default hook.

        Items are the targets that a class loss of torch does not ignore, with their weights; for other losses, samples.
        """
        count = self._loss_items.count(batch)
        return super().count_items(batch) if count is None else count

    @override
    def _items_are_samples(self, batch: Pair) -> bool:
        return not overrides(self, Trainer, "count_items") and self._loss_items.are_samples(batch)

    @property
    def _loss_items(self) -> LossItems:
        if self._known_loss is None or self._known_loss.loss_func is not self.loss_func:
            self._known_loss = LossItems(self.loss_func)
        return self._known_loss

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        outputs: Tensor = self.model(inputs)
        return StepOutput(loss=self.compute_train_loss(outputs, targets), outputs=outputs)

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        inputs, targets = batch
        outputs: Tensor = self.model(inputs)
        return StepOutput(loss=self.compute_eval_loss(outputs, targets), outputs=outputs)

    @override
    def predict_step(self, batch: Any) -> Tensor:
        """Compute the model's outputs from a batch `(inputs, targets)`, or from inputs alone."""
        outputs: Tensor = self.model(batch if isinstance(batch, Tensor) else batch[0])
        return outputs

    @override
    def check_batch(self, batch: Any) -> None:
        if not (isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
            advice = "Give a collate_fn that makes pairs, or derive from TrainingLoop for batches of your own."
            if isinstance(batch, Tensor) or (isinstance(batch, Sequence) and len(batch) == 1):
                advice = "Inputs and targets belong in one dataset, such as TensorDataset(inputs, targets)."
            raise DataError(
                f"{type(self).__name__} trains on batches (inputs, targets), two tensors, and the data gives "
                f"{describe(batch)}. {advice}"
            )
        self._checks_shapes = self._loss_items.is_elementwise

    def _check_shapes(self, outputs: Tensor, targets: Tensor) -> None:
        self._checks_shapes = targets.shape[:1].numel() < 2  # one sample is compared with itself in any shape
        check_not_crossed(type(self).__name__, outputs.shape, targets.shape)


def check_mean(trainer: Trainer, items: LossItems, base: type[Trainer] = Trainer) -> None:
    """Raise `OptionError` if the loss is not a mean, or if it is unknown what it is a mean over.

    Args:
        trainer: The trainer.
        items: The items of its loss function.
        base: The class whose losses are means over these items. A class derived from it may compute losses of its own.
    """
    owner = type(trainer).__name__
    is_used = [
        not overrides(trainer, base, f"compute_{kind}_loss") and not overrides(trainer, base, f"{kind}_step")
        for kind in ("train", "eval")
    ]
    if items.reduction in ("sum", "none") and any(is_used):
        raise OptionError(
            f"{owner}(loss_func=...): the loss has reduction={items.reduction!r}, and must be a mean over the batch. "
            "Leave reduction out, or derive from TrainingLoop and return StepOutput.from_sum(loss_sum, ...)."
        )
    if overrides(trainer, base, "count_items"):
        return
    if items.is_undetermined:
        raise OptionError(
            f"{owner}(loss_func={type(items.loss_func).__name__}(...)): the loss has a forward of its own, and weight, "
            'ignore_index or reduction="sum" of torch\'s loss: what it is a mean over is unknown. Override '
            "count_items(self, batch) to return that, such as `len(batch[1])` for the samples, or derive the loss from "
            "nn.Module."
        )
    if items.is_selective and not all(is_used):
        raise OptionError(
            f"{owner}: loss_func weights or ignores classes, and {owner} computes a loss of its own. Override "
            "count_items(self, batch) to return what that loss is a mean over: `return super().count_items(batch)` if "
            "it is the same as for loss_func, and `return len(batch[1])` if it is the samples."
        )


def check_not_crossed(owner: str, outputs: Sequence[int], targets: Sequence[int]) -> None:
    """Raise `LossError` for shapes whose broadcast has more elements than both, as of (n, 1) and (n,).

    Example:
        >>> check_not_crossed("Trainer", (8, 3), (8, 1))  # each target is compared with the outputs of its sample
    """
    try:
        both: torch.Size = torch.broadcast_shapes(outputs, targets)  # type: ignore[no-untyped-call]  # in torch
    except RuntimeError:
        return  # the loss raises
    if both.numel() > max(math.prod(outputs), math.prod(targets)):
        raise LossError(
            f"{owner}: the outputs of the model have the shape {tuple(outputs)} and the targets {tuple(targets)}. The "
            f"loss would broadcast both to {tuple(both)}, and compare each output with the targets of other samples. "
            "Give both the same shape: `outputs.squeeze(1)` in the model, or `targets.unsqueeze(1)` in the dataset."
        )


def describe(batch: object) -> str:
    """Describe the type of a batch, for an error message.

    Example:
        >>> describe({"x": 1})
        'a dict with the keys x'
        >>> describe((1, 2.0, "three"))
        'a tuple of (int, float, str)'
    """
    if isinstance(batch, dict):
        return f"a dict with the keys {', '.join(map(str, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of ({', '.join(type(part).__name__ for part in batch)})"
    return f"a {type(batch).__name__}"

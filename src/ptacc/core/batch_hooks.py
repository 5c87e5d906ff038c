"""Hooks that receive batches. The loop inherits them, so that mixins can refine them with `super()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Generic

import torch
from torch import Tensor

from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.core.callback import overrides
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.errors import DataError
from ptacc.tensors.structures import leading_dimension
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import StepOutput


class BatchHooks(TrainerCore, Generic[BatchT, OutputT]):
    """The hooks of the loop and of batch mixins: they receive batches and step outputs."""

    _role: ClassVar[Role] = "core"

    @hook("default")
    def count_items(self, batch: BatchT) -> float:
        """Return the number of items that the loss of a batch is a mean over, or the sum of their weights.

        Default hook: the number of samples, which is the leading dimension of the batch's first tensor. Override it if
        the loss is a mean over something else, such as tokens. Called before the batch is moved to the device.

        Raises:
            DataError: The batch contains no tensor with a dimension, or `labels` of which losses ignore some.
        """
        check_labels(batch)
        return leading_dimension(batch)

    def _items_are_samples(self, batch: BatchT) -> bool:  # loops decide by the batch
        """Return whether the items of a batch are its samples, whose total over all ranks is known."""
        return not overrides(self, BatchHooks, "count_items")

    @hook("default")
    def check_batch(self, batch: BatchT) -> None:
        """Raise `DataError` if the steps cannot process `batch`.

        Default hook: accepts every batch. Called with the first batch of a run and of each evaluation.
        """

    @hook("default")
    def train_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Compute the loss and the outputs of one training batch.

        Default hook. A loop defines it; mixins may refine it with `super()`. A loop whose `eval_step` calls
        `train_step`, which is the default, also calls it without gradients, in evaluations.
        """
        raise NotImplementedError

    @hook("default")
    def eval_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Compute the loss and the outputs of one batch of an evaluation.

        Default hook, called in eval mode without gradients. A loop defines it; mixins may refine it with `super()`.
        """
        raise NotImplementedError

    @hook("default")
    def predict_step(self, batch: BatchT) -> OutputT:
        """Compute the outputs of one batch of a prediction.

        Default hook, called in eval mode without gradients: the outputs of `eval_step`. Override it for batches
        without targets.
        """
        return self.eval_step(batch).outputs

    @hook("event")
    def on_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Event: the gradients of a training batch were accumulated. Call `super()` first.

        Do not keep a reference to `output`: it holds device memory.
        """

    @hook("event")
    def on_eval_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Event: a batch was evaluated. Not called for padding batches. Call `super()` first."""


def check_labels(batch: object) -> None:
    """Raise `DataError` for a dictionary with `labels`, as of transformers, some of which losses leave out."""
    if isinstance(batch, tuple | list | Tensor) or not isinstance(batch, Mapping):
        return
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.is_cpu and (labels == -100).any():
        raise DataError(
            'count_items: some of batch["labels"] are -100, which losses leave out of their means. Override '
            'count_items(self, batch) to return what the loss is a mean over: `int((batch["labels"] != -100).sum())`, '
            'with `batch["labels"][:, 1:]` for a causal language model, or `len(batch["labels"])` for samples.'
        )


class BatchMixin(Mixin, BatchHooks[BatchT, OutputT]):
    """Base class of mixins whose hooks receive batches: generic in the types of batches and of step outputs."""

    _role: ClassVar[Role] = "batch mixin"

    def _batch_types_must_match_the_loop(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Make type checkers report a mixin whose batch types are not those of the loop; never called.

        The loop defines this method as well. Type checkers compare the two definitions, and name the method in the
        error.
        """

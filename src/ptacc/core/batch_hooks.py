"""Hooks that receive batches. The loop inherits them, so that mixins can refine them with `super()`."""

from __future__ import annotations

from typing import ClassVar, Generic

from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.tensors.structures import leading_dimension
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import StepOutput


class BatchHooks(TrainerCore, Generic[BatchT, OutputT]):
    """The hooks of the loop and of batch mixins: they receive batches and step outputs."""

    _role: ClassVar[Role] = "core"

    @hook("default")
    def count_items(self, batch: BatchT) -> int:
        """Return the number of items that the loss of a batch is a mean over.

        Default hook: the leading dimension of the batch's first tensor. Override it if the loss is a mean over
        something else, such as tokens. Called before the batch is moved to the device.
        """
        return leading_dimension(batch)

    @hook("default")
    def check_batch(self, batch: BatchT) -> None:
        """Raise `DataError` if the steps cannot process `batch`.

        Default hook: accepts every batch. Called with the first batch of a run and of each evaluation.
        """

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


class BatchMixin(Mixin, BatchHooks[BatchT, OutputT]):
    """Base class of mixins whose hooks receive batches: generic in the types of batches and of step outputs."""

    _role: ClassVar[Role] = "batch mixin"

    def _batch_types_must_match_the_loop(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Make type checkers report a mixin whose batch types are not those of the loop; never called.

        The loop defines this method as well. Type checkers compare the two definitions, and name the method in the
        error.
        """

"""The hooks that touch batches: declared below the loop, so that mixins can refine them through `super()`."""

from __future__ import annotations

from typing import ClassVar, Generic

from ptacc.composition.composable import hook
from ptacc.composition.roles import Role
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.tensors.structures import leading_dimension
from ptacc.types.aliases import BatchT, OutputT
from ptacc.types.outputs import StepOutput


class BatchHooks(TrainerCore, Generic[BatchT, OutputT]):
    """What the loop and the mixins that touch batches have in common."""

    _role: ClassVar[Role] = "core"

    @hook("default")
    def count_items(self, batch: BatchT) -> int:
        """Return how many items the batch's loss is a mean over: the leading dimension of its first tensor.

        It is asked before the batch is moved to the device. Override it where the loss is a mean over something else,
        such as tokens.
        """
        return leading_dimension(batch)

    @hook("default")
    def check_batch(self, batch: BatchT) -> None:
        """Raise `DataError` if the first batch of a run is not what the steps take."""

    @hook("default")
    def eval_step(self, batch: BatchT) -> StepOutput[OutputT]:
        """Compute the loss and the outputs of one batch, in eval mode and without gradients."""
        raise NotImplementedError

    @hook("default")
    def predict_step(self, batch: BatchT) -> OutputT:
        """Compute the outputs of one batch, in eval mode and without gradients: by default, those of `eval_step`."""
        return self.eval_step(batch).outputs

    @hook("event")
    def on_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """A batch was trained on: its gradients are added up. Keep no reference to the output."""

    @hook("event")
    def on_eval_batch_end(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """A batch was evaluated; not called for phantoms."""


class BatchMixin(Mixin, BatchHooks[BatchT, OutputT]):
    """The base of every mixin that touches batches: generic in the batch and in what a step puts out."""

    _role: ClassVar[Role] = "batch mixin"

    def _batch_types_must_match_the_loop(self, batch: BatchT, output: StepOutput[OutputT]) -> None:
        """Exist for type checkers, which refuse a mixin whose batches are not those of the loop."""

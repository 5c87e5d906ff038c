"""Supervised training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from typing_extensions import override

from ptacc.errors import DataError, OptionError
from ptacc.loop.loop import TrainingLoop
from ptacc.types.aliases import Pair, PairSample
from ptacc.types.outputs import StepOutput


class Trainer(TrainingLoop[Pair, Tensor, PairSample]):
    """Trains a model on batches `(inputs, targets)` with a loss function of its outputs and the targets.

    Options:
        loss_func: Returns the mean loss of a batch, a scalar, from `(outputs, targets)`.

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

    @override
    def check_options(self) -> None:
        if isinstance(self.loss_func, type) or not callable(self.loss_func):
            raise OptionError(
                f"{type(self).__name__}(loss_func={self.loss_func!r}): must be a function of (outputs, targets), "
                "such as nn.CrossEntropyLoss()."
            )

    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a training batch, a scalar. A default hook: `loss_func(outputs, targets)`."""
        return self.loss_func(outputs, targets)

    def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of an evaluation batch, a scalar. A default hook: `loss_func(outputs, targets)`."""
        return self.loss_func(outputs, targets)

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
    def predict_step(self, batch: Pair | Tensor) -> Tensor:
        """Compute the model's outputs from a batch `(inputs, targets)`, or from inputs alone."""
        outputs: Tensor = self.model(batch if isinstance(batch, Tensor) else batch[0])
        return outputs

    @override
    def check_batch(self, batch: object) -> None:
        if not (isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
            raise DataError(
                f"{type(self).__name__} trains on batches (inputs, targets), two tensors, and the data gives "
                f"{describe(batch)}. Give a collate_fn that makes pairs, or derive from TrainingLoop for batches of "
                "your own."
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

"""Contrastive learning with the negatives of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.callback import overrides
from ptacc.errors import DataError
from ptacc.loop.loop import TrainingLoop
from ptacc.trainers.supervised import describe
from ptacc.types.aliases import ModelT, Pair, PairSample
from ptacc.types.outputs import StepOutput
from ptacc.validation import check_positive


class ContrastiveTrainer(TrainingLoop[Pair, Tensor, ModelT, PairSample], Generic[ModelT]):
    """Trains a model to embed the two parts of a pair, such as two views of an image, closer than those of other pairs.

    Each first part is classified as belonging to its second part, among those of all pairs in the batch, by the cosine
    of their embeddings, and each second part the same way. The loss is the mean of both cross-entropies. With several
    processes, the other pairs are those of all processes, with gradients: the numbers are those of one process with the
    whole batch. With gradient accumulation, they are those of a single batch of the step.

    The model gives embeddings `(items, features)`. The two parts have the same shape, and the model takes them as one
    batch. For parts of different kinds, such as images and texts, override `embed`.

    Options:
        temperature: What the cosines are divided by, above 0.

    Hooks: `embed`. Steps and evaluations report `accuracy`: the share of first parts whose second part is the nearest
    one. It depends on the batch size. Outputs and predictions are normalised embeddings; `predict` takes inputs alone,
    too.

    Source: https://arxiv.org/abs/1807.03748, and https://arxiv.org/abs/2103.00020 for both directions.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from ptacc.trainers import ContrastiveTrainer
        >>> views = [(x, x + 0.1 * torch.randn(8)) for x in torch.randn(64, 8)]
        >>> model = nn.Linear(8, 4)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> trainer = ContrastiveTrainer(model, optimizer=optimizer, default_callbacks=())
        >>> history = trainer.train(views, num_epochs=10, per_device_batch_size=16)
        >>> history[-1].train_metrics["accuracy"] > 0.5
        True
    """

    temperature: float = 0.1

    @override
    def check_options(self) -> None:
        check_positive(type(self).__name__, "temperature", self.temperature)

    @hook("default")
    def embed(self, batch: Pair) -> tuple[Tensor, Tensor]:
        """Return the embeddings `(items, features)` of both parts of a batch. A default hook."""
        first, second = self.model(torch.cat(list(batch))).chunk(2)
        return first, second

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        first, second = (normalize(part, dim=1) for part in self.embed(batch))
        all_first, own = self.gather_with_grad(first)
        all_second, _ = self.gather_with_grad(second)
        logits = first @ all_second.T / self.temperature
        backward = second @ all_first.T / self.temperature
        loss = (cross_entropy(logits, own) + cross_entropy(backward, own)) / 2
        accuracy = (logits.detach().argmax(dim=1) == own).to(loss.dtype).mean()
        return StepOutput(loss=loss, outputs=first, logged={"accuracy": accuracy})

    @override
    def predict_step(self, batch: Any) -> Tensor:
        """Compute the normalised embeddings of inputs, or of the first parts of pairs."""
        return normalize(self.model(batch if isinstance(batch, Tensor) else batch[0]), dim=1)

    @override
    def check_batch(self, batch: Any) -> None:
        if not (isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
            raise DataError(
                f"{type(self).__name__}: a batch must be two tensors, and the data gives {describe(batch)}."
            )
        shapes = [tuple(part.shape) for part in batch]
        if shapes[0] != shapes[1] and not overrides(self, ContrastiveTrainer, "embed"):
            raise DataError(
                f"{type(self).__name__}: the two parts of a batch have the shapes {shapes[0]} and {shapes[1]}. "
                "Override embed() for parts of different kinds."
            )

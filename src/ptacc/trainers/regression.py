"""Regression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, replace
from typing import Generic, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from ptacc.errors import DataError, OptionError
from ptacc.mixins.metrics import MetricsMixin
from ptacc.trainers.class_metrics import add_metrics
from ptacc.trainers.supervised import Trainer, check_mean
from ptacc.types.aliases import ModelT, Pair
from ptacc.types.outputs import StepOutput
from ptacc.types.protocols import MetricLike

Score: TypeAlias = Literal["rmse", "mae", "r2"]


class RegressionTrainer(MetricsMixin[Pair, Tensor], Trainer[ModelT], Generic[ModelT]):
    """Trains a model of one or several numbers on targets of the same shape as its outputs.

    Targets `(items,)` also fit outputs `(items, 1)`, and the other way round. Other shapes that differ are an error:
    torch would compare each output with the targets of all samples. Targets are converted to the dtype of the outputs,
    and for metrics both to float32 if it has fewer bits.

    Options:
        loss_func: By default `nn.MSELoss()`.
        scores: What evaluations report: `"rmse"`, the root of the mean squared error, `"mae"`, the mean absolute error,
            and `"r2"`, the share of the variance that is explained, which needs two samples or more. RMSE and MAE are
            over all numbers, R2 is a mean over the columns of `(items, columns)`. By default all three.

    A metric of yours in `metrics` replaces one of the same name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from ptacc.trainers import RegressionTrainer
        >>> inputs = torch.randn(64, 4)
        >>> data = TensorDataset(inputs, inputs.sum(dim=1))
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> trainer = RegressionTrainer(model, optimizer=optimizer, default_callbacks=())
        >>> history = trainer.train(data, data, num_epochs=20)
        >>> history[-1].metrics["r2"] > 0.99
        True
    """

    loss_func: Callable[[Tensor, Tensor], Tensor] = field(default_factory=nn.MSELoss)
    scores: Sequence[Score] = ("rmse", "mae", "r2")

    @override
    def check_options(self) -> None:
        check_mean(self, self._loss_items, RegressionTrainer)
        add_metrics(self, make_scores(type(self).__name__, self.scores))

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().compute_train_loss(outputs, match_outputs(type(self).__name__, outputs, targets))

    @override
    def compute_eval_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().compute_eval_loss(outputs, match_outputs(type(self).__name__, outputs, targets))

    @override
    def update_metrics(self, batch: Pair, output: StepOutput[Tensor], metrics: Iterable[MetricLike]) -> None:
        inputs, targets = batch
        exact = output.outputs.to(torch.promote_types(output.outputs.dtype, torch.float32))
        targets = match_outputs(type(self).__name__, exact, targets)
        super().update_metrics((inputs, targets), replace(output, outputs=exact), metrics)


def make_scores(owner: str, names: Sequence[Score]) -> dict[str, MetricLike]:
    """Return the metrics of regression by name."""
    from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

    if wrong := [name for name in names if name not in get_args(Score)]:
        raise OptionError(f"{owner}(scores=...): {wrong[0]!r} is unknown. The scores are {', '.join(get_args(Score))}.")
    makers: dict[Score, Callable[[], MetricLike]] = {
        "rmse": lambda: MeanSquaredError(squared=False),
        "mae": MeanAbsoluteError,
        "r2": R2Score,
    }
    return {name: makers[name]() for name in names}


def match_outputs(owner: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return targets in the shape and the dtype of the outputs, which may differ by a last dimension of size 1.

    Raises:
        DataError: The shapes differ in more than that.
    """
    if outputs.shape == (*targets.shape, 1):
        targets = targets.unsqueeze(-1)
    elif targets.shape == (*outputs.shape, 1):
        targets = targets.squeeze(-1)
    elif outputs.shape != targets.shape:
        raise DataError(
            f"{owner}: the outputs have the shape {tuple(outputs.shape)}, and the targets {tuple(targets.shape)}. They "
            "must have the same shape, apart from a last dimension of size 1."
        )
    return targets.to(outputs.dtype)

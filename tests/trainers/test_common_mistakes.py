"""Mistakes with the data and the loss of `Trainer` are errors before a weight changes, and say what to do."""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f
from torch.optim import SGD
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import Trainer
from ptacc.errors import DataError, LossError

X, Y = torch.randn(24, 4), torch.randn(24)
ELEMENTWISE = [
    nn.MSELoss(),
    nn.L1Loss(),
    nn.HuberLoss(),
    nn.PoissonNLLLoss(),
    f.mse_loss,
    partial(f.huber_loss, delta=2),
]


class Flat(nn.Module):
    """Returns outputs of the shape (n,), or (n, 1)."""

    def __init__(self, *, is_flat: bool) -> None:
        super().__init__()
        self.linear, self.is_flat = nn.Linear(4, 1), is_flat

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        return outputs.squeeze(1) if self.is_flat else outputs


def make(loss_func: Callable[..., Tensor] = f.mse_loss, *, is_flat: bool = False, cls: type[Trainer] = Trainer) -> Any:
    """Make a trainer, typed as Any, since type checkers would reject some of these calls."""
    model = Flat(is_flat=is_flat)
    return cls(model, loss_func=loss_func, optimizer=SGD(model.parameters(), lr=0.1), default_callbacks=())


@pytest.mark.parametrize("loss_func", ELEMENTWISE)
@pytest.mark.parametrize("is_flat", [False, True])
def test_outputs_and_targets_that_would_be_crossed_are_an_error(loss_func: Any, is_flat: bool) -> None:
    trainer = make(loss_func, is_flat=is_flat)
    before = trainer.model.linear.weight.clone()
    targets = Y[:, None] if is_flat else Y
    with pytest.raises(LossError, match=r"broadcast both to \(8, 8\).*outputs.squeeze\(1\).*targets.unsqueeze\(1\)"):
        trainer.train(TensorDataset(X, targets), num_epochs=1)
    assert torch.equal(before, trainer.model.linear.weight)


def test_an_evaluation_checks_the_shapes_too() -> None:
    with pytest.raises(LossError, match=r"outputs of the model have the shape \(8, 1\) and the targets \(8,\)"):
        make().evaluate(TensorDataset(X, Y))


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")  # (1, 1) and (1,), which are not crossed
def test_a_first_batch_of_one_sample_leaves_the_check_to_the_next_one() -> None:
    batches = [(X[:1], Y[:1]), (X[1:9], Y[1:9]), (X[9:], Y[9:])]
    for call in ("train", "evaluate"):
        options = {"num_epochs": 1, "train_dataloader_kwargs": {"shuffle": False}} if call == "train" else {}
        with pytest.raises(LossError, match=r"broadcast both to \(8, 8\)"):
            getattr(make(), call)(batches, collate_fn=operator.itemgetter(0), per_device_batch_size=1, **options)


def test_a_loss_that_changes_the_shapes_is_used_as_it_is() -> None:
    def squeezed(outputs: Tensor, targets: Tensor) -> Tensor:
        return f.mse_loss(outputs.squeeze(1), targets)

    class Squeezing(Trainer):
        @override
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().compute_train_loss(outputs.squeeze(1), targets)

    for trainer in (make(squeezed), make(cls=Squeezing)):
        assert len(trainer.train(TensorDataset(X, Y), num_epochs=1)) == 1


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
def test_one_target_for_all_outputs_of_a_sample_is_allowed() -> None:
    model = nn.Linear(4, 3)
    trainer = Trainer(model, loss_func=f.mse_loss, optimizer=SGD(model.parameters(), lr=0.1), default_callbacks=())
    assert len(trainer.train(TensorDataset(X, Y[:, None]), num_epochs=1)) == 1


ARRAYS = [(X, Y), (X, Y[:, None]), [X, Y], (X.numpy(), Y.numpy()), [X.numpy(), np.arange(24)]]


@pytest.mark.parametrize("arrays", ARRAYS, ids=lambda arrays: f"{type(arrays).__name__} {type(arrays[0]).__name__}")
def test_a_pair_of_arrays_is_not_a_dataset(arrays: Any) -> None:
    for act in (partial(make().train, num_epochs=1), make().evaluate, make().predict):
        with pytest.raises(DataError, match=r"of two arrays .*give TensorDataset\(inputs, targets\)"):
            act(arrays)


@pytest.mark.parametrize("data", [(X, Y), (X,), (TensorDataset(X),)], ids=["inputs, targets", "inputs", "dataset"])
def test_data_without_targets_is_an_error(data: tuple[Any, ...]) -> None:
    with pytest.raises(DataError, match=r"belong in one dataset, such as TensorDataset\(inputs, targets\)"):
        make().train(*data, num_epochs=1)

"""Regression: the shapes of targets, and the scores."""

from typing import Any

import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset
from torchmetrics.regression import ExplainedVariance

from ptacc.errors import DataError, OptionError
from ptacc.trainers import RegressionTrainer
from tests.ranks import run_ranks
from tests.trainers.cases import NUMBERS, make_classifier, make_data, make_inputs


def make(outputs: int = 1, **options: Any) -> RegressionTrainer:
    model, optimizer = make_classifier(outputs)()
    return RegressionTrainer(model, optimizer=optimizer, default_callbacks=(), **options)


def evaluate(size: int) -> dict[str, float]:
    return dict(make().evaluate(make_data(NUMBERS), per_device_batch_size=size).metrics)


@pytest.mark.timeout(60)
def test_scores_are_those_of_scikit_learn_on_any_number_of_processes() -> None:
    predicted, true = make().model(make_inputs()).detach()[:, 0].numpy(), NUMBERS.numpy()
    expected = {
        "rmse": root_mean_squared_error(true, predicted),
        "mae": mean_absolute_error(true, predicted),
        "r2": r2_score(true, predicted),
    }
    assert evaluate(10) == pytest.approx(expected, rel=1e-6)
    assert run_ranks(evaluate, 2, 5) == [pytest.approx(expected, rel=1e-6)] * 2


def evaluate_one_batch() -> dict[str, float]:
    trainer = make(2, metrics={"explained": ExplainedVariance(multioutput="raw_values")})
    data = make_data(torch.stack([NUMBERS, -NUMBERS], dim=1))
    return dict(trainer.evaluate(Subset(data, range(4)), per_device_batch_size=4).metrics)


@pytest.mark.timeout(60)
def test_scores_need_no_batch_on_some_of_the_processes() -> None:
    assert run_ranks(evaluate_one_batch, 2) == [pytest.approx(evaluate_one_batch(), rel=1e-6)] * 2


@pytest.mark.parametrize("targets", [NUMBERS, NUMBERS[:, None], NUMBERS.float()])
def test_a_last_dimension_of_one_and_the_dtype_make_no_difference(targets: Tensor) -> None:
    loss = make().evaluate(make_data(targets)).loss
    assert loss == pytest.approx((make().model(make_inputs())[:, 0] - NUMBERS).square().mean().item(), rel=1e-6)


def test_scores_of_a_model_of_bfloat16_are_those_of_its_outputs_and_the_exact_targets() -> None:
    model = nn.Linear(4, 1).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = make_inputs().bfloat16(), 2001 + NUMBERS.float()
    trainer = RegressionTrainer(model, optimizer=optimizer, scores=["mae"], default_callbacks=())
    mae = trainer.evaluate(TensorDataset(inputs, targets)).metrics["mae"]
    assert mae == pytest.approx((model(inputs)[:, 0].float() - targets).abs().mean().item(), rel=1e-6)


def test_outputs_without_the_last_dimension_take_targets_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    trainer = RegressionTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), default_callbacks=())
    history = trainer.train(make_data(NUMBERS[:, None]), make_data(NUMBERS), num_epochs=1)
    assert history[-1].metrics.keys() == {"rmse", "mae", "r2"}


def test_whole_numbers_are_targets_too() -> None:
    assert make().train(make_data(NUMBERS.long()), num_epochs=1)[-1].step == 3


def test_other_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"the outputs have the shape \(8, 3\), and the targets \(8,\)"):
        make(outputs=3).train(make_data(NUMBERS), num_epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scores": ["rms"]}, "'rms' is unknown"), ({"loss_func": nn.L1Loss(reduction="sum")}, "must be a mean")],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**options)

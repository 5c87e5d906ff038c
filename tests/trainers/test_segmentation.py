"""Segmentation: what is ignored, and the metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ptacc.errors import OptionError
from ptacc.trainers import SegmentationTrainer
from tests.ranks import run_ranks
from tests.trainers.cases import IMAGES, MASKS, make_segmenter


def make(num_classes: int = 2, **options: Any) -> SegmentationTrainer:
    model, optimizer = make_segmenter()
    return SegmentationTrainer(model, optimizer=optimizer, num_classes=num_classes, default_callbacks=(), **options)


def evaluate(ignored: int, size: int) -> dict[str, float]:
    data = TensorDataset(IMAGES, MASKS.masked_fill(MASKS == -100, ignored))
    trainer = make(per_class_iou=True, loss_func=nn.CrossEntropyLoss(ignore_index=ignored))
    return dict(trainer.evaluate(data, per_device_batch_size=size).metrics)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ignored", [-100, 255])
def test_metrics_are_those_of_scikit_learn_over_the_pixels_that_are_not_ignored(ignored: int) -> None:
    is_labelled = MASKS != -100
    predicted, true = make().model(IMAGES).argmax(dim=1)[is_labelled], MASKS[is_labelled]
    each = [jaccard_score(true == index, predicted == index) for index in range(2)]
    expected = {"accuracy": accuracy_score(true, predicted), "mean_iou": sum(each) / 2}
    expected |= {f"class_iou/{index}": value for index, value in enumerate(each)}
    assert evaluate(ignored, 10) == pytest.approx(expected)
    assert run_ranks(evaluate, 2, ignored, 5) == [pytest.approx(expected)] * 2


@pytest.mark.parametrize(
    ("loss", "ignored"),
    [
        (cross_entropy, -100),
        (partial(cross_entropy, ignore_index=255), 255),
        (lambda *pair: 1 * cross_entropy(*pair), -100),
    ],
)
def test_metrics_ignore_the_pixels_that_a_function_does(loss: Callable[..., Tensor], ignored: int) -> None:
    data = TensorDataset(IMAGES, MASKS.masked_fill(MASKS == -100, ignored))
    result = make(per_class_iou=True, loss_func=loss).evaluate(data, per_device_batch_size=24)
    assert result.metrics == evaluate(-100, 24)
    assert result.loss == pytest.approx(loss(make().model(IMAGES), data.tensors[1]).item(), rel=1e-12)


@pytest.mark.parametrize("ignored", [None, "none"])
def test_another_kind_of_ignored_index_of_a_function_of_yours_is_not_read(ignored: object) -> None:
    def loss(outputs: Tensor, targets: Tensor, ignore_index: object) -> Tensor:
        return cross_entropy(outputs, targets)

    make(loss_func=partial(loss, ignore_index=ignored))


def test_the_number_of_classes_is_checked() -> None:
    with pytest.raises(OptionError, match="num_classes=1"):
        make(num_classes=1)


def test_a_class_that_does_not_occur_is_left_out_of_the_mean() -> None:
    data = TensorDataset(IMAGES, torch.zeros_like(MASKS))
    model = nn.Conv2d(2, 3, kernel_size=1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)  # type: ignore[arg-type]
    trainer = SegmentationTrainer(
        model, optimizer=torch.optim.SGD(model.parameters()), num_classes=3, default_callbacks=()
    )
    assert trainer.evaluate(data).metrics["mean_iou"] == 1.0

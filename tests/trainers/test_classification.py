"""Classification: mixing with class weights, metrics by option, and mistakes."""

from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.data import TensorDataset
from typing_extensions import override

from ptacc import GradAccumMixin, SeedMixin
from ptacc.errors import DataError, LossError, OptionError
from ptacc.mixins.mixup import MIXING
from ptacc.rng import derive_seed
from ptacc.trainers import ClassificationTrainer
from tests.ranks import run_ranks
from tests.trainers.cases import CLASS_WEIGHTS, LABELS, make_classifier, make_data, make_inputs


class Classifier(SeedMixin, GradAccumMixin, ClassificationTrainer): ...


class Focal(nn.CrossEntropyLoss):
    @override
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        losses = cross_entropy(input, target, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


def make(**options: Any) -> Classifier:
    model, optimizer = make_classifier(3)()
    given: dict[str, Any] = {"num_classes": 3, "seed": 3, "default_callbacks": (), **options}
    return Classifier(model, optimizer=optimizer, **given)


def train(data: TensorDataset, size: int = 6, **options: Any) -> list[float]:
    in_order: Any = {"shuffle": False}
    history = make(**options).train(data, num_epochs=1, per_device_batch_size=size, train_dataloader_kwargs=in_order)
    return [step.loss for step in history.steps]


def weighted_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the losses, each times the weight of its class."""
    return -(log_softmax(outputs, dim=1)[range(len(targets)), targets] * CLASS_WEIGHTS[targets]).sum()


def test_a_mixed_batch_has_the_shares_of_both_class_weights() -> None:
    inputs, targets = make_inputs()[:6], LABELS[:6]
    share = Random(derive_seed(3, MIXING, 0, 6, 0)).betavariate(0.4, 0.4)
    outputs = make().model(share * inputs + (1 - share) * inputs.roll(1, 0)).detach()
    total = share * weighted_loss(outputs, targets) + (1 - share) * weighted_loss(outputs, targets.roll(1))
    loss = train(make_data(LABELS), loss_func=nn.CrossEntropyLoss(CLASS_WEIGHTS), mixup_alpha=0.4)[0]
    assert loss == pytest.approx(float(total / CLASS_WEIGHTS[targets].sum()), rel=1e-12)


def test_a_loss_derived_from_cross_entropy_is_called_with_its_own_forward() -> None:
    expected = Focal()(make().model(make_inputs()[:6]), LABELS[:6]).item()
    assert train(make_data(LABELS), loss_func=Focal())[0] == pytest.approx(expected, rel=1e-12)


def test_label_smoothing_and_mixing_are_for_training_only() -> None:
    trainer = make(label_smoothing=0.3, mixup_alpha=1.0)
    expected = cross_entropy(trainer.model(make_inputs()), LABELS).item()
    assert trainer.evaluate(make_data(LABELS)).loss == pytest.approx(expected, rel=1e-12)


def evaluate(ranks: int) -> dict[str, float]:
    trainer = make(top_k=[2], per_class_accuracy=True)
    return dict(trainer.evaluate(make_data(LABELS), per_device_batch_size=10 // ranks).metrics)


@pytest.mark.timeout(60)
def test_accuracies_count_each_sample_once_on_any_number_of_processes() -> None:
    outputs = make().model(make_inputs())
    is_right = outputs.argmax(1) == LABELS
    expected = {f"class_accuracy/{c}": is_right[c == LABELS].double().mean().item() for c in range(3)}
    expected["accuracy"] = is_right.double().mean().item()
    expected["top2_accuracy"] = (outputs.topk(2).indices == LABELS[:, None]).any(1).double().mean().item()
    assert evaluate(1) == pytest.approx(expected)
    assert run_ranks(evaluate, 2, 2) == [pytest.approx(expected)] * 2


@pytest.mark.parametrize("ignored", [1, 255])
def test_accuracies_leave_out_samples_that_the_loss_ignores(ignored: int) -> None:
    trainer = make(top_k=[2], per_class_accuracy=True, loss_func=nn.CrossEntropyLoss(ignore_index=ignored))
    used = LABELS != 1
    metrics = trainer.evaluate(make_data(LABELS.masked_fill(~used, ignored))).metrics
    outputs = trainer.model(make_inputs())[used]
    assert metrics["accuracy"] == pytest.approx((outputs.argmax(1) == LABELS[used]).double().mean().item())
    hits = (outputs.topk(2).indices == LABELS[used, None]).any(1)
    assert metrics["top2_accuracy"] == pytest.approx(hits.double().mean().item())
    assert metrics["class_accuracy/2"] == pytest.approx((outputs[LABELS[used] == 2].argmax(1) == 2).double().mean())


def test_targets_may_be_probabilities() -> None:
    probabilities = nn.functional.one_hot(LABELS, 3).double()
    expected = train(make_data(LABELS), label_smoothing=0.1)
    assert train(make_data(probabilities), label_smoothing=0.1) == pytest.approx(expected, rel=1e-12)
    assert make().evaluate(make_data(probabilities)).metrics == make().evaluate(make_data(LABELS)).metrics


def test_a_metric_of_the_user_replaces_one_of_the_same_name() -> None:
    from torchmetrics.classification import MulticlassAccuracy

    own = MulticlassAccuracy(3, average="macro")
    assert make(metrics={"accuracy": own}).metrics == {"accuracy": own}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1.*at least 2"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5.*from 0 to 1"),
        ({"label_smoothing": 0.1, "loss_func": nn.MultiMarginLoss()}, "override compute_train_loss"),
        ({"label_smoothing": 0.1, "loss_func": Focal()}, "whose forward loss_func must have"),
        ({"loss_func": Focal(CLASS_WEIGHTS)}, r"loss_func=Focal\(...\)\): the loss has a forward of its own"),
        ({"mixup_alpha": 0.1, "loss_func": partial(cross_entropy, weight=CLASS_WEIGHTS)}, "needs loss_func=nn.Cross"),
        ({"mixup_alpha": 0.1, "loss_func": partial(cross_entropy, ignore_index=0)}, "ignores those of class 0"),
        ({"mixup_classes": 4}, "num_classes here"),
        ({"top_k": [4]}, "top_k=4: must be from 1 to num_classes=3"),
        ({"mixup_alpha": 0.1, "loss_func": nn.CrossEntropyLoss(ignore_index=0)}, "ignores those of class 0"),
        ({"loss_func": nn.CrossEntropyLoss(reduction="sum")}, "must be a mean over the batch"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make(**options)


@pytest.mark.parametrize("targets", [LABELS[:, None], LABELS.int(), LABELS.double()])
def test_targets_that_are_not_class_indices_are_refused(targets: Tensor) -> None:
    with pytest.raises(DataError, match=r"must be class indices, torch.int64 of the shape \(items,\)"):
        train(make_data(targets))


def test_probabilities_with_class_weights_are_refused() -> None:
    with pytest.raises(DataError, match="Give class indices"):
        train(make_data(torch.ones(24, 3).double() / 3), loss_func=nn.CrossEntropyLoss(CLASS_WEIGHTS))


def test_a_model_with_another_number_of_classes_is_refused() -> None:
    with pytest.raises(LossError, match=r"num_classes=5.*shape \(6, 3\)"):
        train(make_data(LABELS), num_classes=5)


def test_a_loss_of_a_derived_class_next_to_class_weights_needs_its_items() -> None:
    class Own(ClassificationTrainer):
        def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[explicit-override]
            return super().compute_train_loss(outputs, targets) + outputs.square().mean()

    model, optimizer = make_classifier(3)()
    with pytest.raises(OptionError, match="Override count_items"):
        Own(model, optimizer=optimizer, num_classes=3, loss_func=nn.CrossEntropyLoss(CLASS_WEIGHTS))

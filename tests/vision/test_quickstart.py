"""The first script of pytorch-accelerated's README with only the import changed, and its variants with metrics."""

from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.data import DataLoader, random_split
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall
from typing_extensions import override

from ptacc import Callback, EvalResult, MetricsMixin, Pair, StepOutput, Trainer
from ptacc.protocols import SupportsMetrics
from ptacc.testing import epoch_order
from tests.ranks import run_ranks
from tests.vision.digits_files import write_mnist
from tests.vision.environment import enable_vision

EPOCHS = 16


class DigitModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        self.layers = nn.Sequential(*layers)

    @override
    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(images.flatten(1))
        return scores


def load_mnist(folder: Path) -> list[Any]:
    """Return 1,400 digits for training, 197 for evaluations and 200 for the test."""
    enable_vision()
    from torchvision import transforms
    from torchvision.datasets import MNIST

    write_mnist(folder)
    torch.manual_seed(0)
    dataset = MNIST(str(folder), download=True, transform=transforms.ToTensor())
    return random_split(dataset, [1400, 197, 200])


def make_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    model = DigitModel()
    optimizer = SGD(model.parameters(), lr=0.001, momentum=0.9)
    return {"model": model, "loss_func": nn.CrossEntropyLoss(), "optimizer": optimizer}


# ---- the script


def train_plainly(model: nn.Module, data: Any, seed: int) -> None:
    optimizer = SGD(model.parameters(), lr=0.001, momentum=0.9)
    for epoch in range(EPOCHS):
        for images, labels in DataLoader(data, batch_size=32, sampler=epoch_order(seed, epoch, len(data))):
            cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def measure_accuracy(model: nn.Module, data: Any) -> float:
    images, labels = next(iter(DataLoader(data, batch_size=len(data))))
    return float((model(images).argmax(dim=1) == labels).float().mean())


def run_both(folder: Path) -> list[tuple[float, list[Tensor]]]:
    """Return the accuracy and the weights of the trainer and of a plain loop."""
    train, validation, test = load_mnist(folder)
    parts, plain = make_parts(), DigitModel()
    plain.load_state_dict(parts["model"].state_dict())
    trainer = Trainer(**parts)
    trainer.train(train_dataset=train, eval_dataset=validation, num_epochs=EPOCHS, per_device_batch_size=32)
    trainer.evaluate(dataset=test, per_device_batch_size=64)
    train_plainly(plain, train, trainer.run.seed)
    return [(measure_accuracy(model, test), [*model.parameters()]) for model in (parts["model"], plain)]


@pytest.mark.timeout(120)
def test_the_quickstart_has_the_accuracy_and_the_weights_of_a_plain_loop(tmp_path: Path) -> None:
    ((accuracy, weights), (expected, plain_weights)), *_ = run_ranks(run_both, 1, tmp_path, timeout=100)
    assert accuracy == expected
    assert accuracy > 0.8
    torch.testing.assert_close(weights, plain_weights, rtol=0, atol=0)


# ---- metrics


def make_scores() -> dict[str, MulticlassAccuracy | MulticlassPrecision | MulticlassRecall]:
    return {
        "accuracy": MulticlassAccuracy(10, average="micro"),
        "precision": MulticlassPrecision(10),
        "recall": MulticlassRecall(10),
    }


class MetricsTrainer(MetricsMixin, Trainer):
    pass


class RememberScores(Callback[SupportsMetrics]):
    """Reads the metrics of each evaluation."""

    def __init__(self) -> None:
        self.scores: list[Mapping[str, float]] = []

    @override
    def on_evaluation_end(self, trainer: SupportsMetrics, name: str, result: EvalResult) -> None:
        self.scores.append(result.metrics)


class OwnScores(Trainer):
    """Computes the metrics in hooks of the loop."""

    scores: MetricCollection = field(default_factory=lambda: MetricCollection(make_scores()))  # type: ignore[arg-type]

    @override
    def on_eval_batch_end(self, batch: Pair, output: StepOutput[Tensor]) -> None:
        super().on_eval_batch_end(batch, output)
        self.scores.update(output.outputs, batch[1])

    @override
    def compute_metrics(self) -> dict[str, float]:
        values = {name: float(value) for name, value in self.scores.compute().items()}
        self.scores.reset()
        return super().compute_metrics() | values

    @override
    def eval_value_names(self) -> frozenset[str]:
        return super().eval_value_names() | {"accuracy", "precision", "recall"}


def run_with_metrics(folder: Path) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    """Return the metrics of each epoch that a callback was given, and those of a loop of one's own."""
    train, validation, _ = load_mnist(folder)
    remembering = RememberScores()
    options: dict[str, Any] = {"num_epochs": 4, "train_dataloader_kwargs": {"shuffle": False}}
    MetricsTrainer(**make_parts(), metrics=make_scores(), callbacks=[remembering]).train(train, validation, **options)
    history = OwnScores(**make_parts()).train(train, validation, **options)
    return remembering.scores, [record.metrics for record in history]


@pytest.mark.timeout(120)
def test_metrics_of_the_loop_equal_those_that_a_callback_reads(tmp_path: Path) -> None:
    ((in_callback, in_loop),) = run_ranks(run_with_metrics, 1, tmp_path, timeout=100)
    assert in_callback == in_loop
    assert in_callback[-1]["accuracy"] > 0.8
    assert in_callback[0].keys() == {"accuracy", "precision", "recall"}

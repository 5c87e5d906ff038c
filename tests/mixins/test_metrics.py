import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import CatMetric, MeanMetric, Metric, MetricCollection, MinMaxMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.text import ROUGEScore
from typing_extensions import override

from ptacc import MetricsMixin, StepOutput, Trainer, TrainingLoop
from ptacc.errors import DataError, OptionError
from ptacc.protocols import MetricLike
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


class Measured(MetricsMixin, Trainer): ...


class Wrapping:
    """An object of one's own with metrics of torchmetrics in it."""

    def __init__(self) -> None:
        self.counts: list[Any] = [SumMetric(), CatMetric()]

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        for count in self.counts:
            count.update(torch.ones(len(targets)))

    def compute(self) -> dict[str, float]:
        total, ones = self.counts
        return {"total": total.compute(), "ones": len(ones.compute())}

    def reset(self) -> None:
        for count in self.counts:
            count.reset()


def evaluate_wrapping() -> dict[str, float]:
    trainer = Measured(**tiny_parts(), metrics={"own": Wrapping(), "count": CountedSamples()})
    return dict(trainer.evaluate(tiny_data(11), per_device_batch_size=2).metrics)


class CountedSamples(SumMetric):
    """Counts samples, and is synchronised by torchmetrics."""

    @override
    def update(self, outputs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update(float(len(targets)))


def test_metrics_within_an_object_of_ones_own_count_each_sample_once() -> None:
    expected = {"own/total": 11.0, "own/ones": 11.0, "count": 11.0}
    assert evaluate_wrapping() == expected
    assert run_ranks(evaluate_wrapping, 2) == [expected] * 2


def right_answers(model: nn.Module, samples: int) -> float:
    inputs, targets = tiny_data(samples).tensors
    return float((model(inputs).argmax(dim=1) == targets).double().mean())


def accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(2, average="micro")


def test_a_metric_is_over_all_samples_of_an_evaluation() -> None:
    trainer = Measured(**tiny_parts(), metrics={"accuracy": accuracy()})
    result = trainer.evaluate(tiny_data(23), per_device_batch_size=5)
    assert result.metrics["accuracy"] == pytest.approx(right_answers(trainer.model, 23))


def test_each_evaluation_set_has_its_own_values() -> None:
    trainer = Measured(**tiny_parts(), metrics={"accuracy": accuracy()})
    record = trainer.train(tiny_data(), {"few": tiny_data(3), "many": tiny_data(24)}, num_epochs=1)[0]
    assert record.values()["few/accuracy"] == pytest.approx(right_answers(trainer.model, 3))
    assert record.values()["many/accuracy"] == pytest.approx(right_answers(trainer.model, 24))


def test_training_metrics_are_reset_each_epoch() -> None:
    trainer = Measured(**tiny_parts(), train_metrics={"accuracy": accuracy()})
    history = trainer.train(tiny_data(24), num_epochs=3)
    metric = trainer.train_metrics["accuracy"]
    assert isinstance(metric, MulticlassAccuracy)
    assert metric.update_count == 3
    assert history[-1].values()["train/accuracy"] == history[-1].train_metrics["accuracy"]


def test_collections_and_vectors_report_each_value() -> None:
    both = MetricCollection({"micro": accuracy(), "f1": MulticlassF1Score(2)})
    trainer = Measured(**tiny_parts(), metrics={"all": both, "each": MulticlassAccuracy(2, average=None)})
    assert set(trainer.evaluate(tiny_data()).metrics) == {"all/micro", "all/f1", "each/0", "each/1"}


def test_a_plain_object_is_a_metric() -> None:
    class Count:
        def __init__(self) -> None:
            self.seen = 0

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            self.seen += len(targets)

        def compute(self) -> int:
            return self.seen

        def reset(self) -> None:
            self.seen = 0

    trainer = Measured(**tiny_parts(), metrics={"count": Count()})
    assert [trainer.evaluate(tiny_data(11)).metrics["count"] for _ in range(2)] == [11.0, 11.0]


def test_a_batch_that_is_not_a_pair_names_the_hook_to_override() -> None:
    class Auto(MetricsMixin[Tensor, Tensor], TrainingLoop[Tensor, Tensor]):
        @override
        def train_step(self, batch: Tensor) -> StepOutput[Tensor]:
            return StepOutput(loss=self.model(batch).mean(), outputs=batch)

    parts: dict[str, Any] = {name: value for name, value in tiny_parts().items() if name != "loss_func"}
    trainer = Auto(**parts, metrics={"mean": MeanMetric()})
    with pytest.raises(DataError, match=r"not a pair .* Override update_metrics"):
        trainer.evaluate(list(torch.ones(8, 4, dtype=torch.float64)))


def test_update_metrics_can_be_overridden() -> None:
    class LossMeasured(MetricsMixin, Trainer):
        @override
        def update_metrics(
            self, batch: tuple[Tensor, Tensor], output: StepOutput[Tensor], metrics: Iterable[MetricLike]
        ) -> None:
            for metric in metrics:
                metric.update(output.loss, weight=len(batch[0]))

    trainer = LossMeasured(**tiny_parts(), metrics={"mean_loss": MeanMetric().double()})
    result = trainer.evaluate(tiny_data(13), per_device_batch_size=4)
    assert result.metrics["mean_loss"] == pytest.approx(result.loss)


class Reports(MeanMetric):
    """Reports what it is given, in place of its mean."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    @override
    def update(self, value: Any, weight: Any = 1.0) -> None:
        super().update(1.0)

    @override
    def compute(self) -> Any:
        return self.value


def evaluate_reporting(value: Any) -> dict[str, float]:
    trainer = Measured(**tiny_parts(), metrics={"m": Reports(value)})
    return dict(trainer.evaluate(tiny_data(8)).metrics)


def test_a_metric_may_report_arrays_and_nothing() -> None:
    arrays = evaluate_reporting({"a": np.array([0.25, 0.5]), "b": np.float32(2), "c": [1, torch.ones(2)]})
    assert arrays == {"m/a/0": 0.25, "m/a/1": 0.5, "m/b": 2.0, "m/c/0": 1.0, "m/c/1/0": 1.0, "m/c/1/1": 1.0}
    assert math.isnan(evaluate_reporting(None)["m"])


def test_a_metric_that_reports_a_text_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"The metric 'm/report' gave a str, .*must be a number"):
        evaluate_reporting({"report": "precision 0.5"})


def test_two_values_of_one_name_are_refused() -> None:
    with pytest.raises(OptionError, match="Two values of metrics are called 'm/1'"):
        evaluate_reporting({1: 0.5, "1": 0.25})


class Texts(MetricsMixin[Any, Tensor], TrainingLoop[Any, Tensor]):
    """Passes a model its inputs, and metrics two texts or numbers of each sample."""

    @override
    def train_step(self, batch: Any) -> StepOutput[Tensor]:
        return StepOutput(self.model(batch["x"]).mean(), batch["x"])

    @override
    def update_metrics(self, batch: Any, output: StepOutput[Tensor], metrics: Iterable[MetricLike]) -> None:
        for metric in metrics:
            metric.update(batch["predicted"], batch["true"])


class Entries(Metric):
    """Has a list with one entry per sample, which is reduced by a function of its own, and counts."""

    entries: Any
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("entries", [], dist_reduce_fx=sum)
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, predicted: list[str], true: list[str]) -> None:
        self.entries += [torch.tensor(float(len(text))) for text in predicted]
        self.samples += len(predicted)

    @override
    def compute(self) -> Tensor:
        return (sum(self.entries) if isinstance(self.entries, list) else self.entries) / self.samples


def evaluate_texts(size: int, samples: int = 5) -> dict[str, float]:
    predicted, true = ["a b c", "a b", "x y", "a", "d e f"], ["a b c d", "a b", "a b", "b", "d e"]
    data = [{"x": torch.ones(4), "predicted": p, "true": t} for p, t in zip(predicted, true, strict=True)]
    model = nn.Linear(4, 1)
    rouge = ROUGEScore(rouge_keys="rouge1")
    metrics: dict[str, Any] = {
        "rouge": rouge,
        "all": MetricCollection({"rouge": rouge.clone(), "least": MinMaxMetric(Entries())}, compute_groups=False),
        "grouped": MetricCollection({"first": Entries(), "second": Entries()}),
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Texts(
        model, optimizer=optimizer, default_callbacks=(), metrics=metrics, train_metrics={"mean": Entries()}
    )
    first = trainer.evaluate(data[:samples], per_device_batch_size=size).metrics
    assert trainer.evaluate(data[:samples], per_device_batch_size=size).metrics == first
    trained = trainer.train(data[:samples], num_epochs=2, per_device_batch_size=size)
    return dict(first) | {"train": trained[-1].train_metrics["mean"]}


@pytest.mark.parametrize("samples", [5, 2, 1])
def test_lists_with_an_entry_per_sample_are_over_all_samples_on_any_number_of_processes(samples: int) -> None:
    expected = evaluate_texts(4, samples)
    assert run_ranks(evaluate_texts, 2, 2, samples) == [pytest.approx(expected, rel=1e-6)] * 2

"""Values that evaluation steps log: means over items, exact however the data is split, that can be monitored."""

from typing import Any

import pytest
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from typing_extensions import override

from ptacc import Best, CheckpointMixin, EarlyStoppingMixin, MetricsMixin, RestoreBestWeights, StepOutput, Trainer
from ptacc.errors import LossError, MonitorError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

Pair = tuple[Tensor, Tensor]


class Logging(EarlyStoppingMixin, MetricsMixin, Trainer):
    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        return self.with_norm(super().train_step(batch))

    @override
    def eval_step(self, batch: Pair) -> StepOutput[Tensor]:
        return self.with_norm(super().eval_step(batch))

    def with_norm(self, output: StepOutput[Tensor]) -> StepOutput[Tensor]:
        return StepOutput(output.loss, output.outputs, logged={"norm": output.outputs.square().mean()})


def evaluate(size: int) -> float:
    return Logging(**tiny_parts()).evaluate(tiny_data(23), per_device_batch_size=size).metrics["norm"]


def test_logged_values_of_an_evaluation_are_means_over_its_samples_however_they_are_split() -> None:
    right = float(tiny_parts()["model"](tiny_data(23).tensors[0]).detach().square().mean())
    assert evaluate(5) == pytest.approx(right, rel=1e-12)
    assert run_ranks(evaluate, 2, 5) == pytest.approx([right, right], rel=1e-12)
    assert run_ranks(evaluate, 2, 23) == pytest.approx([right, right], rel=1e-12)  # one rank has padding only


def test_logged_values_of_training_and_of_evaluation_have_names_of_their_own() -> None:
    record = Logging(**tiny_parts()).train(tiny_data(), tiny_data(8), num_epochs=1)[0]
    assert record.values()["norm"] == record.metrics["norm"] != record.values()["train/norm"]


@pytest.mark.parametrize("monitor", ["norm", "train/norm"])
def test_a_logged_value_can_be_monitored(monitor: str) -> None:
    best = RestoreBestWeights(monitor)
    parts: dict[str, Any] = {**tiny_parts(), "callbacks": [best], "early_stopping_monitor": monitor}
    history = Logging(**parts).train(tiny_data(), tiny_data(8), num_epochs=2)
    assert best.best_value == min(record.values()[monitor] for record in history)


@pytest.mark.parametrize("monitor", ["norms", "train/norms"])
def test_a_value_that_was_not_reported_is_an_error_after_the_first_epoch(monitor: str) -> None:
    trainer = Logging(**tiny_parts(), early_stopping_monitor=monitor)
    with pytest.raises(MonitorError, match=r"norms'\): no such value is reported. Did you mean `(train/)?norm`"):
        trainer.train(tiny_data(), tiny_data(8), num_epochs=2)
    assert trainer.progress.steps == 3


def test_a_logged_value_needs_a_name_of_its_own() -> None:
    trainer = Logging(**tiny_parts(), metrics={"norm": MulticlassAccuracy(2)})
    with pytest.raises(LossError, match=r"eval_step: logged\['norm'\]: an evaluation reports another value"):
        trainer.evaluate(tiny_data())


class Measured(CheckpointMixin, MetricsMixin, Trainer): ...


def test_a_metric_of_each_class_is_monitored_by_the_names_it_reports(tmp_path: Any) -> None:
    metrics = {"f1": MulticlassF1Score(2, average=None)}
    best = Best("f1/1", mode="max")
    trainer = Measured(**tiny_parts(), metrics=metrics, checkpoint_dir=tmp_path, keep_best=best)
    assert trainer.train(tiny_data(), tiny_data(8), num_epochs=1)[0].metrics.keys() == {"f1/0", "f1/1"}
    for monitor in ("f1", "f1/2"):
        trainer = Measured(**tiny_parts(), metrics=metrics, checkpoint_dir=tmp_path / monitor, keep_best=Best(monitor))
        with pytest.raises(MonitorError, match=r"Reported values: eval_loss, f1/0, f1/1"):
            trainer.train(tiny_data(), tiny_data(8), num_epochs=1)


def test_a_logged_value_with_the_name_of_a_training_metric_is_refused() -> None:
    trainer = Logging(**tiny_parts(), train_metrics={"norm": MulticlassAccuracy(2)})
    with pytest.raises(LossError, match=r"train_step: logged\['norm'\] has the name of a training metric"):
        trainer.train(tiny_data(), tiny_data(8), num_epochs=1)

"""Modules among the options are on the GPU during a run, an evaluation and a prediction, and on the host after it."""

from dataclasses import field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import MetricsMixin, Pair, StepOutput, Trainer
from tests.gpu.parts import CLASSES, make_data, make_net


class Distilling(MetricsMixin, Trainer):
    """Trains towards a teacher too, with losses in a mapping."""

    teacher: nn.Module
    more_losses: dict[str, nn.Module] = field(default_factory=dict)

    @override
    def train_step(self, batch: Pair) -> StepOutput[Tensor]:
        output = super().train_step(batch)
        with torch.no_grad():
            target = self.teacher(batch[0]).argmax(1)
        return StepOutput(loss=output.loss + self.more_losses["soft"](output.outputs, target), outputs=output.outputs)


def train(device: torch.device) -> tuple[Tensor, Distilling]:
    net, weights = make_net(), torch.linspace(0.5, 2, CLASSES)
    options: dict[str, Any] = {
        "teacher": make_net(hidden=32).to(device).eval(),
        "loss_func": nn.CrossEntropyLoss(weight=weights.to(device)),
        "more_losses": {"soft": nn.CrossEntropyLoss(weight=weights.to(device))},
        "metrics": {"accuracy": MulticlassAccuracy(CLASSES)},
    }
    trainer = Distilling(net, optimizer=SGD(net.parameters(), lr=0.1), default_callbacks=(), **options)
    data = make_data()
    trainer.train(data, data, max_steps=4, train_dataloader_kwargs={"shuffle": False})
    trainer.evaluate(data)
    return nn.utils.parameters_to_vector(net.parameters()), trainer


@pytest.mark.usefixtures("deterministic")
def test_modules_among_the_options_are_moved_and_put_back(device: torch.device) -> None:
    weights, trainer = train(torch.device("cpu"))
    expected, placed = train(device)
    assert torch.equal(weights, expected)
    for moved, place in ((trainer, "cpu"), (placed, "cuda")):
        tensors = [*moved.teacher.parameters(), moved.loss_func.weight, moved.more_losses["soft"].weight]  # type: ignore[attr-defined]
        assert {tensor.device.type for tensor in tensors} == {place}
    assert trainer.metrics["accuracy"].device.type == "cpu"  # type: ignore[attr-defined]

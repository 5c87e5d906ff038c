"""What optimizers of users do: add a group during a run, have a `zero_grad` of their own, or no learning rate."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer
from transformers.optimization import Adafactor
from typing_extensions import override

from ptacc import CheckpointMixin, GradClipMixin, Trainer
from ptacc.errors import CheckpointError
from ptacc.testing import tiny_data, tiny_parts


class Growing(CheckpointMixin, GradClipMixin, Trainer):
    """Trains the weight, and the bias as well from the second epoch on."""

    max_grad_norm: float | None = 0.1

    @override
    def on_epoch_start(self) -> None:
        super().on_epoch_start()
        if self.progress.epochs == 1:
            self.add_group()

    def add_group(self) -> None:
        bias = self.unwrapped_model.get_parameter("bias").requires_grad_()
        self.optimizer.add_param_group({"params": [bias], "lr": 0.5})


class GrowingAgain(Growing):
    """Adds the group again when the run resumes after it was added."""

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        if self.progress.epochs > 1:
            self.add_group()


def parts() -> dict[str, Any]:
    made = tiny_parts()
    made["model"].get_parameter("bias").requires_grad_(False)
    return made | {"optimizer": SGD([made["model"].weight], lr=0.1, momentum=0.9)}


def end(kind: type[Growing], directory: Path, num_epochs: int, **options: Any) -> Tensor:
    trainer = kind(**parts(), checkpoint_dir=directory, **options)
    trainer.train(tiny_data(8), num_epochs=num_epochs, train_dataloader_kwargs={"shuffle": False})
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_group_that_is_added_during_the_run_is_trained_and_clipped(tmp_path: Path) -> None:
    model, optimizer = (made := parts())["model"], made["optimizer"]
    inputs, targets = tiny_data(8).tensors
    for epoch in range(3):
        if epoch == 1:
            optimizer.add_param_group({"params": [model.bias.requires_grad_()], "lr": 0.5})
        nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(end(Growing, tmp_path, 3), expected)


def test_a_run_resumes_with_an_added_group_if_it_is_added_again(tmp_path: Path) -> None:
    whole = end(Growing, tmp_path / "whole", 4)
    end(Growing, tmp_path / "stopped", 2)
    with pytest.raises(CheckpointError, match="group 1 of the checkpoint holds bias"):
        end(Growing, tmp_path / "stopped", 4, resume=True)
    assert torch.equal(end(GrowingAgain, tmp_path / "stopped", 4, resume=True), whole)


class Keeping(SGD):
    """Keeps the gradients of a step for the next one."""

    @override
    def zero_grad(self, set_to_none: bool = True) -> None: ...


def patched(weights: Any, lr: float) -> SGD:
    optimizer = SGD(weights, lr=lr)
    optimizer.zero_grad = functools.partial(Keeping.zero_grad, optimizer)  # type: ignore[method-assign, arg-type]
    return optimizer


@pytest.mark.parametrize("make", [Keeping, patched])
def test_a_zero_grad_of_the_class_or_the_object_is_called(make: Any) -> None:
    made = tiny_parts()
    Trainer(**(made | {"optimizer": make(made["model"].parameters(), lr=0.1)})).train(tiny_data(8), max_steps=1)
    assert made["model"].bias.grad is not None


class Fixed(SGD):
    """Has no entry `lr` in its groups."""

    @override
    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
                parameter -= 0.1 * parameter.grad


def without_rates(model: nn.Module) -> SGD:
    optimizer = Fixed([{"params": [parameter]} for parameter in model.parameters()], lr=0.1)
    for group in optimizer.param_groups:
        del group["lr"]
    return optimizer


def adafactor(model: nn.Module) -> Optimizer:
    return Adafactor(model.parameters())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("make", [without_rates, adafactor])
def test_an_optimizer_without_a_learning_rate_reports_nan(make: Any, tmp_path: Path) -> None:
    class Saving(CheckpointMixin, Trainer): ...

    made, file = tiny_parts(), tmp_path / "history.jsonl"
    options: dict[str, Any] = {**made, "optimizer": make(made["model"]), "checkpoint_dir": tmp_path}
    Saving(**options, history_file=file).train(tiny_data(8), num_epochs=1)
    history = Saving(**options, history_file=file, resume=True).train(tiny_data(8), num_epochs=2)
    assert all(math.isnan(record.learning_rate) for record in (*history, *history.steps))
    assert math.isnan(history.values[-1].values["learning_rate"])
    lines = map(json.loads, file.read_text().splitlines())
    assert {line["learning_rate"] for line in lines if line["kind"] in ("epoch", "step")} == {None}

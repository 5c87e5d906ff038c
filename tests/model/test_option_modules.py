"""Modules and metrics among the options are found wherever they are, and a device gets those that may be moved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from ptacc import (
    MetricsMixin,
    Trainer,
)
from ptacc.model.option_modules import find_option_modules, find_trained_options, options_moved
from ptacc.testing import tiny_data, tiny_parts
from ptacc.tuning import find_learning_rate

META = torch.device("meta")


class Recording(nn.Module):
    """A module that records where it was moved to."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = nn.ModuleList(children), list[str]()

    @override
    def to(self, *args: Any, **_: Any) -> "Recording":
        self.calls.append(str(args[0]))
        return self

    def measure(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


@dataclass
class Losses:
    main: nn.Module
    unset: nn.Module = field(init=False)


class Distilling(MetricsMixin, Trainer):
    teacher: nn.Module
    losses: Mapping[str, Sequence[object]] = field(default_factory=dict)
    shared: ClassVar[nn.Module] = Recording()


def make(**options: Any) -> Distilling:
    parts: dict[str, Any] = {"teacher": Recording(), **tiny_parts(), **options}
    return Distilling(**parts)


def test_modules_are_found_in_all_options_and_class_attributes_each_once() -> None:
    a, b, c, d, e, metric = *(Recording() for _ in range(5)), MulticlassAccuracy(2)
    losses = {"first": [a, (b, a)], "second": [Losses(c)]}
    trainer = make(teacher=d, losses=losses, loss_func=partial(e.measure), metrics={"accuracy": metric})
    found = [*find_option_modules(trainer).values()]
    assert {id(part) for part in found} == {id(part) for part in (trainer.model, a, b, c, d, e, metric, trainer.shared)}
    assert len(found) == 8


def test_a_module_is_trained_if_the_optimizer_has_a_parameter_of_it() -> None:
    parts, centres, frozen = tiny_parts(), nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*parts["model"].parameters(), centres.weight], lr=0.1)
    trainer = make(**{**parts, "optimizer": optimizer, "losses": {"first": [centres, frozen]}})
    assert list(find_trained_options(trainer, optimizer).values()) == [centres]
    names = [name for name, _ in trainer.trained_modules.named_parameters()]
    assert names[-2:] == ["options.losses.first.0.weight", "options.losses.first.0.bias"]


def test_modules_are_on_the_device_within_the_block_and_back_after_it() -> None:
    trainer = make(losses={"first": [Recording(nn.Linear(2, 2))]})
    parts = [part for part in find_option_modules(trainer).values() if isinstance(part, Recording)]
    for part in parts:
        part.calls.clear()
    with options_moved(trainer, trainer.model, META):
        assert [part.calls for part in parts] == [["meta"]] * 3
    assert [part.calls for part in parts] == [["meta", "cpu"]] * 3
    with options_moved(trainer, trainer.model, torch.device("cpu")):
        assert [part.calls for part in parts] == [["meta", "cpu"]] * 3


def test_a_module_that_the_user_has_placed_elsewhere_stays_there() -> None:
    placed, mixed = Recording(nn.Linear(2, 2, device=META)), Recording(nn.Linear(2, 2, device=META), nn.Linear(2, 2))
    trainer = make(losses={"first": [placed, mixed, nn.Sequential(mixed)]})
    with options_moved(trainer, trainer.model, META):
        assert placed.calls == mixed.calls == []


def test_a_module_that_holds_the_model_is_moved_without_it() -> None:
    parts, own = tiny_parts(), Recording(nn.Linear(2, 2))
    with options_moved(make(**{**parts, "teacher": nn.Sequential(parts["model"], own)}), parts["model"], META):
        assert own.calls == ["meta"]
        assert {parameter.device.type for parameter in parts["model"].parameters()} == {"cpu"}


class CountsBatches(nn.Module):
    """A loss with a buffer that each batch changes."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    @override
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.count += 1
        return nn.functional.cross_entropy(outputs, targets)


class PicksLoss(Trainer):
    all_losses: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)

    @override
    def compute_train_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.all_losses["main"](outputs, targets)


def test_a_search_restores_modules_within_options() -> None:
    loss = CountsBatches()
    find_learning_rate(PicksLoss(**tiny_parts(), all_losses={"main": loss}), tiny_data(), steps=10)
    assert loss.count == 0

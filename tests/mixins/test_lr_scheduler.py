import copy
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from ptacc import GradAccumMixin, LRSchedulerMixin, RunPlan, Trainer
from ptacc.protocols import SchedulerFactory
from ptacc.testing import tiny_data, tiny_parts


class Scheduled(GradAccumMixin, LRSchedulerMixin, Trainer): ...


def rates(create: SchedulerFactory, *, num_epochs: int = 2, **options: Any) -> list[float]:
    trainer = Scheduled(**tiny_parts(), create_scheduler=create, **options)
    history = trainer.train(tiny_data(24), tiny_data(8), num_epochs=num_epochs)
    return [step.learning_rate for step in history.steps]


def test_a_step_scheduler_steps_once_per_step() -> None:
    assert rates(lambda o, plan: StepLR(o, 2, gamma=0.5)) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])


def test_a_step_scheduler_ignores_accumulation() -> None:
    half = rates(lambda o, plan: StepLR(o, 1, gamma=0.5), gradient_accumulation_steps=2)
    assert half == pytest.approx([0.1, 0.05, 0.025, 0.0125])


def test_an_epoch_scheduler_steps_once_per_epoch() -> None:
    found = rates(lambda o, plan: StepLR(o, 1, gamma=0.5), scheduler_interval="epoch")
    assert found == pytest.approx([0.1] * 3 + [0.05] * 3)


def test_reduce_on_plateau_follows_its_monitor() -> None:
    found = rates(
        lambda o, plan: ReduceLROnPlateau(o, mode="max", factor=0.5, patience=0),
        num_epochs=3,
        scheduler_monitor="eval_loss",
    )
    assert found == pytest.approx([0.1] * 6 + [0.05] * 3)


def test_a_trainer_with_a_schedule_evaluates_before_its_first_run() -> None:
    trainer = Scheduled(**tiny_parts(), create_scheduler=lambda o, plan: StepLR(o, 2))
    assert trainer.evaluate(tiny_data(8)).loss > 0


def test_the_plan_is_in_optimizer_steps() -> None:
    plans: list[RunPlan] = []

    def create(optimizer: torch.optim.Optimizer, plan: RunPlan) -> StepLR:
        plans.append(plan)
        return StepLR(optimizer, plan.total_steps)

    rates(create, num_epochs=3, gradient_accumulation_steps=2)
    assert (plans[0].num_epochs, plans[0].steps_per_epoch, plans[0].total_steps) == (3, 2, 6)


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "LambdaLR": (lambda step: 0.9**step,),
    "MultiplicativeLR": (lambda step: 0.9,),
    "StepLR": (2,),
    "MultiStepLR": ([2, 4],),
    "ExponentialLR": (0.9,),
    "CosineAnnealingLR": (6,),
    "CyclicLR": (0.01, 0.1),
    "CosineAnnealingWarmRestarts": (3,),
    "OneCycleLR": (0.1, 6),
}


@pytest.mark.parametrize("name", ["ConstantLR", "LinearLR", "PolynomialLR", *ARGUMENTS])
def test_any_torch_scheduler_gives_the_rates_of_a_plain_loop(name: str) -> None:
    make = getattr(lr_scheduler, name)
    optimizer = tiny_parts()["optimizer"]
    schedule, expected = make(optimizer, *ARGUMENTS.get(name, ())), []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(lambda o, plan: make(o, *ARGUMENTS.get(name, ()))) == expected


def test_a_custom_scheduler_needs_three_methods() -> None:
    class Halving:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.param_groups[0]["lr"] /= 2

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    assert rates(lambda o, plan: Halving(o), num_epochs=1) == [0.1, 0.05, 0.025]


# ---- after the run


SETTINGS: dict[str, tuple[dict[str, Any], SchedulerFactory]] = {
    "a tensor": ({"lr": torch.tensor(0.1)}, lambda o, plan: StepLR(o, 1, gamma=0.5)),
    "a tuple": ({"betas": (0.7, 0.9)}, lambda o, plan: OneCycleLR(o, 0.1, plan.total_steps)),
    "a tuple of tensors": ({"betas": (torch.tensor(0.7), torch.tensor(0.9))}, lambda o, plan: InPlace(o)),
    "a list": ({"betas": [0.7, 0.9]}, lambda o, plan: InPlace(o)),
}


class InPlace:
    """Halves the first of Adam's betas, in the tensor or the list that holds it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.betas = optimizer.param_groups[0]["betas"]

    def step(self) -> None:
        if isinstance(self.betas, list):
            self.betas[0] /= 2
        else:
            self.betas[0].mul_(0.5)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@pytest.mark.parametrize("kind", SETTINGS)
def test_scheduled_settings_return_to_their_values_in_the_same_objects(kind: str) -> None:
    settings, create = SETTINGS[kind]
    parts = tiny_parts()
    parts["optimizer"] = optimizer = torch.optim.Adam(parts["model"].parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    group.update(settings)
    before = copy.deepcopy(settings)
    Scheduled(**parts, create_scheduler=create).train(tiny_data(24), num_epochs=1)
    assert {name: group[name] for name in settings} == before
    assert all(group[name] is value for name, value in settings.items() if not isinstance(value, tuple))
    assert "initial_lr" not in group

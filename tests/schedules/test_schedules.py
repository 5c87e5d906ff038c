"""Schedules are continuous, follow the plan of the run, and resume exactly."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from typing_extensions import override

from ptacc import (
    Callback,
    CheckpointMixin,
    LRSchedulerMixin,
    RunPlan,
    SeedMixin,
    Steps,
    Trainer,
)
from ptacc.errors import OptionError, SchedulerError
from ptacc.protocols import SchedulerFactory
from ptacc.schedules import (
    FactorSchedule,
    decay_start,
    inverse_sqrt,
    join_schedules,
    warmup_cosine,
    warmup_linear,
    warmup_stable_decay,
)
from ptacc.testing import tiny_data, tiny_parts

SCHEDULES: dict[str, FactorSchedule] = {
    "cosine": warmup_cosine(0.1, final=0.1),
    "linear": warmup_linear(Steps(10)),
    "stable": warmup_stable_decay(0.1, decay=0.3),
    "stable-sqrt": warmup_stable_decay(Steps(10), decay=Steps(30), shape="sqrt"),
    "inverse": inverse_sqrt(0.1),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def rates(create: SchedulerFactory, steps: int = 100) -> list[float]:
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=2.0)
    scheduler: Any = create(optimizer, RunPlan.compute(None, None, steps))
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


@every_schedule
def test_a_schedule_rises_to_the_rate_of_the_optimizer_and_falls(name: str) -> None:
    found = rates(SCHEDULES[name])
    assert found[0] == pytest.approx(2.0 / 11)
    assert found[10] == max(found) == 2.0
    assert found == sorted(found[:10]) + sorted(found[10:], reverse=True)


@every_schedule
def test_a_schedule_has_no_jump(name: str) -> None:
    found = rates(SCHEDULES[name], steps=1000)
    limit = 0.4 if "sqrt" in name else 0.2
    assert max(abs(after - before) for before, after in pairwise(found)) < limit


def test_a_cosine_without_a_warmup_is_that_of_torch() -> None:
    expected = rates(lambda optimizer, plan: CosineAnnealingLR(optimizer, plan.total_steps, eta_min=0.2))
    assert rates(warmup_cosine(final=0.1)) == pytest.approx(expected, rel=1e-12)


def test_the_parts_of_a_warmup_stable_decay_have_the_lengths_that_they_are_given() -> None:
    found = rates(warmup_stable_decay(Steps(5), decay=Steps(20), final=0.5))
    assert found.count(2.0) == 76  # of which one is the last of the warm-up, and one the first of the decay
    assert found[80] == 2.0
    assert found[90] == pytest.approx(1.5)


def test_an_inverse_square_root_falls_with_the_steps() -> None:
    found = rates(inverse_sqrt(Steps(3)))
    assert found[15] == pytest.approx(2.0 * math.sqrt(4 / 16))


def test_a_schedule_of_steps_needs_no_length_of_the_run() -> None:
    scheduler = inverse_sqrt(Steps(3))(SGD(nn.Linear(2, 2).parameters(), lr=1.0), RunPlan())
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]


def test_a_rate_that_is_a_tensor_changes_in_place() -> None:
    rate = torch.tensor(2.0)
    optimizer = Adam(nn.Linear(2, 2).parameters(), lr=rate, capturable=False, foreach=False)
    scheduler = warmup_linear()(optimizer, RunPlan.compute(None, None, 4))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 1.5


def test_groups_and_settings_have_schedules_of_their_own() -> None:
    groups = [{"params": nn.Linear(2, 2).parameters(), "name": name} for name in ("body", "head")]
    optimizer = SGD(groups, lr=1.0, momentum=0.8)
    create = join_schedules(
        warmup_linear(), warmup_cosine(groups=["head"]), warmup_linear(final=0.5, setting="momentum", groups=["body"])
    )
    scheduler = create(optimizer, RunPlan.compute(None, None, 4))
    scheduler.step()
    body, head = optimizer.param_groups
    assert (body["lr"], body["momentum"]) == (0.75, pytest.approx(0.7))
    assert (head["lr"], head["momentum"]) == (pytest.approx(0.5 + math.cos(math.pi / 4) / 2), 0.8)


# ---- in a run


class Scheduled(LRSchedulerMixin, SeedMixin, CheckpointMixin, Trainer): ...


class Rates(Callback[Trainer]):
    def __init__(self) -> None:
        self.rates: dict[int, tuple[float, float]] = {}

    @override
    def on_step_start(self, trainer: Trainer) -> None:
        group = trainer.optimizer.param_groups[0]
        self.rates[trainer.progress.steps] = group["lr"], group["momentum"]


def train(folder: Path, create: SchedulerFactory, steps: int = 12, **options: Any) -> dict[int, tuple[float, float]]:
    watching = Rates()
    made = tiny_parts()
    made["optimizer"] = SGD(made["model"].parameters(), lr=0.5, momentum=0.9)
    given: dict[str, Any] = {
        "checkpoint_every": Steps(1),
        "seed": 0,
        "callbacks": [watching],
        "default_callbacks": (),
        **options,
    }
    trainer = Scheduled(**{**made, **given}, checkpoint_dir=folder, create_scheduler=create)
    trainer.train(tiny_data(96), max_steps=steps, per_device_batch_size=4)
    assert made["optimizer"].param_groups[0]["lr"] == 0.5
    return watching.rates


BOTH = join_schedules(warmup_cosine(0.25), warmup_linear(final=0.5, setting="momentum"))


@pytest.mark.parametrize("step", [1, 2, 5, 11])
def test_a_run_resumes_its_schedules_exactly(step: int, tmp_path: Path) -> None:
    expected = train(tmp_path / "whole", BOTH)
    assert len(expected) == 12
    found = train(tmp_path / "resumed", BOTH, resume=tmp_path / "whole" / f"step-{step:08}")
    assert found == {at: rate for at, rate in expected.items() if at >= step}


def test_a_run_continues_from_before_its_decay_to_another_length(tmp_path: Path) -> None:
    create = warmup_stable_decay(Steps(2), decay=0.25)
    start = decay_start(0.25, RunPlan.compute(None, None, 12))
    train(tmp_path / "short", create)
    longer = train(tmp_path / "longer", create, 20, resume=tmp_path / "short" / f"step-{start:08}")
    expected = train(tmp_path / "whole", create, 20)
    assert longer == {at: rate for at, rate in expected.items() if at >= start}


# ---- bad input


@pytest.mark.parametrize("warmup", [-0.1, 1.5, True, "10%"])
def test_a_warmup_is_a_share_or_steps(warmup: Any) -> None:
    with pytest.raises(OptionError, match=r"warmup=.*: must be a share of the run from 0 to 1, or Steps\(n\)"):
        warmup_cosine(warmup)


def test_an_unknown_group_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="for the parameter group 'head', and the optimizer has the groups None"):
        train(tmp_path, warmup_cosine(groups=["head"]))


def test_a_setting_that_the_optimizer_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'betas', and a parameter group has no such number\. It has lr, mom"):
        train(tmp_path, warmup_cosine(setting="betas"))


def test_a_warmup_longer_than_the_run_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="warm-up of 50 steps does not end in a run of 12 steps"):
        train(tmp_path, warmup_cosine(Steps(50)))


def test_a_schedule_of_steps_does_not_step_once_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(SchedulerError, match='counts steps: use scheduler_interval="step"'):
        train(tmp_path, warmup_cosine(), scheduler_interval="epoch")

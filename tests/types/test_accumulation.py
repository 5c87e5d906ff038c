"""The number of steps that batches make while the number of batches per step changes."""

from itertools import islice

import pytest

from ptacc import Progress, RunPlan
from ptacc.protocols import AccumulationSchedule

SCHEDULES = {
    "constant": AccumulationSchedule(3, {}),
    "epochs": AccumulationSchedule(1, {1: 4, 3: 2}),
    "steps": AccumulationSchedule(1, {3: 2, 4: 5, 17: 3}, by_step=True),
}


def walk(schedule: AccumulationSchedule, epochs: int, batches: int) -> list[list[int]]:
    """Return the batches of each step, for each epoch."""
    progress, walked = Progress(), []
    for epoch in range(epochs):
        left, steps = batches, list[int]()
        for size in schedule.sizes_from(progress):
            if left:
                steps.append(min(size, left))
            left -= min(size, left)
            if not left:
                break
        walked.append(steps)
        progress = Progress(steps=progress.steps + len(steps), epochs=epoch + 1)
    return walked


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("batches", [1, 7, 40])
@pytest.mark.parametrize("epochs", [1, 2, 6])
def test_the_plan_is_the_sum_over_the_epochs(name: str, batches: int, epochs: int) -> None:
    schedule, limits = SCHEDULES[name], RunPlan.compute(epochs, None, None)
    plan = schedule.revise(limits, Progress(), batches, batches)
    assert plan.total_steps == sum(len(steps) for steps in walk(schedule, epochs, batches))
    assert plan.num_epochs == epochs


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_plan_stays_the_same_at_each_step(name: str) -> None:
    schedule, limits, done = SCHEDULES[name], RunPlan.compute(6, None, None), 0
    walked = walk(schedule, 6, 7)
    for epoch, steps in enumerate(walked):
        for made in range(len(steps)):
            now = Progress(steps=done + made, epochs=epoch)
            plan = schedule.revise(limits, now, 7 - sum(steps[:made]), 7)
            assert plan.total_steps == sum(map(len, walked))
        done += len(steps)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("max_steps", [1, 5, 20, 100])
def test_a_limit_on_steps_needs_the_epochs_that_reach_it(name: str, max_steps: int) -> None:
    schedule = SCHEDULES[name]
    plan = schedule.revise(RunPlan.compute(None, None, max_steps), Progress(), 7, 7)
    lengths = [len(steps) for steps in walk(schedule, plan.num_epochs, 7)]
    assert sum(lengths[:-1]) < max_steps <= sum(lengths)
    assert plan.total_steps == max_steps


def test_a_skipped_step_counts() -> None:
    schedule = SCHEDULES["steps"]
    expected = list(islice(schedule.sizes_from(Progress(steps=4)), 20))
    assert list(islice(schedule.sizes_from(Progress(steps=1, skipped=3)), 20)) == expected


def test_the_steps_of_an_epoch_are_unknown_if_they_change() -> None:
    plan = SCHEDULES["epochs"].revise(RunPlan.compute(6, None, None), Progress(), 7, 7)
    assert plan.known_steps_per_epoch is None
    assert plan.known_total_steps is not None

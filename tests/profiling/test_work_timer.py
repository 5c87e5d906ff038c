"""The time of forward passes, on a clock that the test sets."""

import pytest
import torch

from ptacc.profiling import work_timer
from ptacc.profiling.work_timer import MOST_TIMED, WorkTimer


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(work_timer, "time", clock)
    return clock


def take_step(timer: WorkTimer, clock: Clock, forward: float, backward: float, batches: int = 1) -> None:
    def compute(loss: object) -> None:
        clock.now += backward

    timer.start()
    for _ in range(batches):
        clock.now += forward
        timer.backward(compute, None)
    clock.now += 100.0  # the update


def test_forward_passes_are_timed_without_backward_passes_and_updates(clock: Clock) -> None:
    timer = WorkTimer(torch.device("cpu"))
    take_step(timer, clock, forward=2.0, backward=50.0, batches=3)
    take_step(timer, clock, forward=1.0, backward=50.0)
    assert timer.pop_seconds() == 7.0
    assert timer.pop_seconds() == 0.0


def test_passes_that_are_not_timed_count_as_much_as_the_mean(clock: Clock) -> None:
    timer = WorkTimer(torch.device("cpu"))
    for _ in range(2 * MOST_TIMED):
        take_step(timer, clock, forward=0.5, backward=1.0)
    assert timer.pop_seconds() == MOST_TIMED

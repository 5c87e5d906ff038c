import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptacc import Best, Monitor
from ptacc.checkpoint.retention import Retention, rank_best
from ptacc.storage.manifest import Manifest

LOSS, ACCURACY = Monitor("loss"), Monitor("accuracy", mode="max")


def at(step: int, metrics: Mapping[str, float] | None = None, label: str = "") -> Manifest:
    return Manifest(f"step-{step:010}", "run", step, 0, 0, 1, sequence=step, label=label, metrics=metrics or {})


def steps_left(retention: Retention, manifests: list[Manifest], protected: tuple[str, ...] = ()) -> list[int]:
    removed = retention.removable(manifests, protected)
    return [manifest.step for manifest in manifests if manifest.name not in removed]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(last=2), [5, 6]),
        (Retention(every=3), [3, 6]),
        (Retention(best=Best(LOSS)), [2, 6]),
        (Retention(best=Best("loss", mode="max")), [4, 6]),
        (Retention(last=1, best=Best(LOSS, count=2), every=3), [1, 2, 3, 6]),
        (Retention(best=Best(ACCURACY, count=2)), [6]),
    ],
)
def test_any_rule_keeps(retention: Retention, left: list[int]) -> None:
    losses = [0.5, 0.25, 1.0, 2.0, math.nan, 0.75]
    manifests = [at(step, {"loss": loss}) for step, loss in enumerate(losses, start=1)]
    assert steps_left(retention, manifests) == left


def test_what_is_protected_is_kept() -> None:
    assert steps_left(Retention(last=1), [at(1), at(2), at(3)], ("step-0000000001",)) == [1, 3]


def test_the_newest_of_a_label_is_kept() -> None:
    there = [at(1, label="best"), at(2, label="best"), at(3), at(4, label="mine"), at(5)]
    assert steps_left(Retention(last=1), there) == [2, 4, 5]


def test_of_equals_the_newest_is_best() -> None:
    older, newer = at(1, {"loss": 1.0}), at(2, {"loss": 1.0})
    assert rank_best([older, newer], LOSS) == [newer, older]


def test_infinity_is_worse_than_a_number_and_nan_is_nothing() -> None:
    manifests = [at(1, {"loss": math.inf}), at(2, {"loss": math.nan}), at(3, {"loss": 9.0})]
    assert rank_best(manifests, LOSS) == [manifests[2], manifests[0]]


rules = st.none() | st.integers(1, 4)


@given(rules, rules, rules, st.lists(st.floats(), min_size=1, max_size=8))
def test_the_newest_and_the_best_are_never_removed(
    last: int | None, best: int | None, every: int | None, losses: list[float]
) -> None:
    manifests = [at(step, {"loss": loss}) for step, loss in enumerate(losses, start=1)]
    left = steps_left(Retention(last, None if best is None else Best(LOSS, count=best), every), manifests)
    assert manifests[-1].step in left
    numbers = [loss for loss in losses if not math.isnan(loss)]
    if best is not None and numbers:
        assert min(numbers) in [losses[step - 1] for step in left]

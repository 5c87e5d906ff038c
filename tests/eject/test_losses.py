"""A script computes what its trainer computes, to the last bit, for each pair of mixins that scripts have."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from ptacc import RestoreBestWeights
from tests.eject.compositions import (
    BATCH,
    CASES,
    EPOCHS,
    RecordedLoss,
    assert_equal,
    eject,
    load_script,
    make_trainer,
    run_script,
    train,
)
from tests.ranks import run_ranks

# The script says that it recomputes the statistics of frozen norm layers, too.
DIFFERENT = ("unfrozen", "swa")
PAIRS = [pair for pair in combinations(CASES, 2) if CASES[pair[0]][0] is not CASES[pair[1]][0] and pair != DIFFERENT]
ONES = [(case,) for case in CASES]
ALL = tuple({mixin: case for case, (mixin, _) in CASES.items() if case != DIFFERENT[0]}.values())


@pytest.mark.parametrize("cases", [(), *ONES, *PAIRS, ALL], ids="+".join)
def test_the_losses_and_weights_of_a_script_are_those_of_its_trainer(cases: Sequence[str], tmp_path: Path) -> None:
    recorded, again = RecordedLoss(), RecordedLoss()
    trainer = make_trainer(cases, recorded)
    script = load_script(eject(trainer), tmp_path)
    script.loss_func = again
    assert_equal(run_script(script, again.losses), train(trainer, recorded.losses))
    assert recorded.losses


@pytest.mark.parametrize("cases", [(), ("averaged",)], ids=str)
def test_a_script_ends_with_the_best_weights(cases: Sequence[str], tmp_path: Path) -> None:
    recorded, again = RecordedLoss(), RecordedLoss()
    best = RestoreBestWeights("train_loss", mode="max")  # those of the first epoch
    trainer = make_trainer(cases, recorded, callbacks=[best])
    script = load_script(eject(trainer), tmp_path)
    script.loss_func = again
    assert_equal(run_script(script, again.losses), train(trainer, recorded.losses))
    assert recorded.losses


def test_the_losses_are_equal_on_two_processes(tmp_path: Path) -> None:
    def compare() -> tuple[list[float], list[float]]:
        recorded, again = RecordedLoss(), RecordedLoss()
        trainer = make_trainer(("seed", "accumulated", "clipped"), recorded)
        script = load_script(eject(trainer), tmp_path)
        script.loss_func = again
        train(trainer, recorded.losses, samples=64)
        run_script(script, again.losses, samples=64)
        return recorded.losses, again.losses

    for expected, found in run_ranks(compare, 2):
        assert len(expected) == EPOCHS * 64 // BATCH // 2
        assert found == expected

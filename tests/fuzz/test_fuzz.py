"""Laws of every composition, tried on random ones: exact resuming, the losses of a plain loop, nothing left changed."""

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from ptacc.data import seeding
from ptacc.run import spikes
from ptacc.testing.laws import same
from tests.checkpoint.runs import in_memory
from tests.fuzz.cases import Case, draw, simpler
from tests.fuzz.plain import plain_losses
from tests.fuzz.runs import Outcome, run_killed, run_uninterrupted

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata calls it
CASES_OF_A_TEST = 20
RELATIVE = 1e-9
MAX_TRIES = 60
"""Compositions that are tried to reduce a failing one."""


def problem_of(case: Case) -> str:
    """Return what is wrong with a case; empty if nothing is."""
    often, early = mock.patch.object(seeding, "CHECK_EVERY", 3), mock.patch.object(spikes, "WARMUP_STEPS", 2)
    try:
        with often, early, tempfile.TemporaryDirectory(prefix="ptacc-", dir=in_memory()) as directory:
            return find_problem(case, Path(directory))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def find_problem(case: Case, directory: Path) -> str:
    whole = run_uninterrupted(case, directory / "whole")
    for outcome in whole:
        if outcome.changed:
            return f"the run left changed: {outcome.changed}"
        if "Composed" not in outcome.explained:
            return f"explain() gave {outcome.explained!r}"
    return check_losses(case, whole) or check_resuming(case, whole, directory / "killed")


def check_losses(case: Case, whole: list[Outcome]) -> str:
    if not case.has_plain_loop:
        return ""
    ranks = [outcome.batches for outcome in whole]
    windows = [[batch for batches in window for batch in batches] for window in zip(*ranks, strict=True)]
    steps, random = whole[0].end.steps, whole[0].random
    expected = torch.tensor(
        plain_losses(
            case,
            windows,
            [step["epoch"] for step in steps],
            [bool(step["logged"].get("loss_spikes")) for step in steps],
            random,
            whole[0].planned_steps,
        )
    )
    losses = torch.tensor([step["loss"] for step in steps])
    relative = 1e-5 if "bf16" in case.mixins else RELATIVE
    return "" if torch.allclose(losses, expected, rtol=relative) else f"losses {losses}, plain {expected}"


def check_resuming(case: Case, whole: list[Outcome], directory: Path) -> str:
    events = whole[case.killed_rank].events
    for kill in case.kills:
        run_killed(case, directory, 1 + int(kill * events))
    for rank, (resumed, uninterrupted) in enumerate(zip(run_uninterrupted(case, directory), whole, strict=True)):
        expected = vars(uninterrupted.end)
        differing = [name for name, value in vars(resumed.end).items() if not same(value, expected[name])]
        if differing:
            return f"resumed, rank {rank} ends with other {', '.join(differing)}"
    return ""


def reduce(case: Case) -> Case:
    """Return a simpler case that fails as well."""
    tries = 0
    while tries < MAX_TRIES:
        for candidate in simpler(case):
            tries += 1
            if problem_of(candidate):
                case = candidate
                break
        else:
            return case
    return case


def check_seeds(seeds: range) -> None:
    for seed in seeds:
        case = draw(seed)
        if problem := problem_of(case):
            reduced = reduce(case)
            pytest.fail(f"seed {seed}: {problem}\n{case}\nreduced: {reduced}\n{problem_of(reduced)}")


def test_a_fault_is_found_and_reduced() -> None:
    case = Case(model="forgetful", optimizer="adam", mixins=("ema",), samples=9, shuffle=True, epochs=2)
    assert problem_of(case).startswith("resumed, rank 0 ends with other weights")
    assert reduce(case) == Case(model="forgetful")


def chunks(first: int, count: int, size: int) -> list[range]:
    return [range(start, start + size) for start in range(first, first + count, size)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seeds", chunks(0, 200, CASES_OF_A_TEST), ids=str)
def test_random_compositions_obey_the_laws(seeds: range) -> None:
    check_seeds(seeds)


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seeds", chunks(200, 4800, 100), ids=str)
def test_many_random_compositions_obey_the_laws(seeds: range) -> None:
    check_seeds(seeds)

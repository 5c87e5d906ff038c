"""Ready trainers compute what a plain loop does, in every split of a step, and resume from their checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ptacc import CheckpointMixin, Steps
from tests.trainers.cases import BATCH, CASES, train, train_as_plain_loop, train_on_ranks

pytestmark = pytest.mark.timeout(120)

every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_weights_are_those_of_a_plain_loop_to_the_last_bit(name: str) -> None:
    state = train(CASES[name])
    for key, value in train_as_plain_loop(CASES[name]).items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.accumulates])
@pytest.mark.parametrize("accumulated", [2, 3])
def test_a_step_may_be_split_into_batches(name: str, accumulated: int) -> None:
    split = train(CASES[name], BATCH // accumulated, gradient_accumulation_steps=accumulated)
    torch.testing.assert_close(split, train(CASES[name]), rtol=1e-12, atol=1e-12)


@every_case
def test_a_step_may_be_split_over_processes(name: str) -> None:
    whole = train(CASES[name])
    for split in train_on_ranks(CASES[name], 2):
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.accumulates])
def test_a_step_may_be_split_over_processes_and_batches(name: str) -> None:
    whole = train(CASES[name])
    for split in train_on_ranks(CASES[name], 2, accumulated=3):
        torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)


@every_case
def test_a_run_resumes_within_an_epoch(name: str, tmp_path: Path) -> None:
    class Saving(CheckpointMixin, CASES[name].trainer): ...  # type: ignore[misc]

    case = replace(CASES[name], trainer=Saving)
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "checkpoint_every": Steps(1)}
    train(case, steps=3, **options)
    resumed = train(case, resume=True, **options)
    assert all(torch.equal(resumed[key], value) for key, value in train(CASES[name]).items())

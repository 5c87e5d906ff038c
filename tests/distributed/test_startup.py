"""The first contact of the ranks of a launch: missing ranks are named in time."""

import os
import time

import pytest

from ptacc import Trainer
from ptacc.distributed.startup import TIMEOUT_VARIABLE
from ptacc.errors import LaunchError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks


def train_unless(absent: int) -> str:
    """Return the error of a rank whose peer never uses its trainer, and does not exit either."""
    os.environ[TIMEOUT_VARIABLE] = "1.5"
    if int(os.environ["RANK"]) == absent:
        time.sleep(3)
        return ""
    with pytest.raises(LaunchError) as error:
        Trainer(**tiny_parts()).train(tiny_data(8), num_epochs=1)
    return str(error.value)


def test_a_rank_that_never_creates_its_trainer_is_named() -> None:
    errors = run_ranks(train_unless, 3, 2, timeout=30)
    assert errors[0].startswith("Rank 0 waited 1.5 s for ranks [2] of 3. ")
    assert TIMEOUT_VARIABLE in errors[0]


def test_ranks_whose_launcher_is_gone_do_not_wait_for_its_store() -> None:
    errors = run_ranks(train_unless, 2, 0, timeout=30)
    assert errors[1].startswith("Rank 1 got no answer from 127.0.0.1:")

"""Tests of the helpers in tests/ranks.py."""

import os
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from ptacc.distributed.failure import is_running
from tests.ranks import RankFailed, launch, run_ranks


def test_results_come_back_in_the_order_of_ranks() -> None:
    def work(offset: int) -> int:
        time.sleep(0.1 * (2 - int(os.environ["RANK"])))
        return offset + int(os.environ["RANK"])

    assert run_ranks(work, 3, 10) == [10, 11, 12]


def test_ranks_reduce_over_gloo() -> None:
    def add_up() -> torch.Tensor:
        dist.init_process_group("gloo")
        total = torch.tensor([1.0 + dist.get_rank()])
        dist.all_reduce(total)
        return total

    assert torch.equal(torch.cat(run_ranks(add_up, 2)), torch.tensor([3.0, 3.0]))


def test_a_failure_names_its_rank_and_ends_the_others() -> None:
    def fail_on_one() -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("no such luck")
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1: .*fail_on_one.*ValueError: no such luck"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - began < 10


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankFailed, match="rank 0: ended without a result, exit code 3"):
        run_ranks(os._exit, 1, 3)


def test_a_hang_is_named_and_killed() -> None:
    def hang_on_one() -> None:
        time.sleep(60 * int(os.environ["RANK"]))

    before = set(psutil.Process().children())
    with pytest.raises(TimeoutError, match=r"no result from ranks \[1\]"):
        run_ranks(hang_on_one, 2, timeout=1.0)
    assert set(psutil.Process().children()) == before


def test_a_result_that_cannot_be_pickled_is_a_failure() -> None:
    with pytest.raises(RankFailed, match="rank 0"):
        run_ranks(lambda: lambda: None, 1)


def test_launch_returns_what_the_command_printed() -> None:
    code = "import os, sys; print(os.environ['GREETING']); sys.exit(3)"
    done = launch([sys.executable, "-c", code], env={"GREETING": "hello"})
    assert (done.returncode, done.stdout, done.stderr) == (3, "hello\n", "")


def test_launch_kills_what_a_hanging_command_started() -> None:
    popen = "subprocess.Popen(['sleep', '60'], start_new_session=True)"
    code = f"import subprocess; child = {popen}; print(child.pid, flush=True); child.wait()"
    with pytest.raises(TimeoutError, match="not done after 2 s") as caught:
        launch([sys.executable, "-c", code], timeout=2.0)
    child = int(str(caught.value).splitlines()[1])
    deadline = time.monotonic() + 5
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)

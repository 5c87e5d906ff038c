"""A rank that waits for a failed one in a call that does not return is ended, and reports why."""

import gc
import re
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ptacc import StepOutput, Trainer
from ptacc.distributed import watchdog
from ptacc.distributed.accelerator import release_accelerator
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import RankFailed, run_ranks

ENDED = "rank 0: ended without a result, exit code 1"


def start() -> DistributedRuntime:
    """Return the ranks, with a watchdog that does not wait long."""
    watchdog.POLL_SECONDS, watchdog.GRACE_SECONDS = 0.05, 0.5
    distributed = Trainer(**tiny_parts()).distributed
    assert isinstance(distributed, DistributedRuntime)
    return distributed


class Waiting(Trainer):
    """Fails on rank 1, and does not return to Python on rank 0, as in a kernel that waits for rank 1."""

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if self.progress.steps == 3:
            if self._distributed.rank == 1:
                raise KeyError("on purpose")
            time.sleep(60)
        return super().train_step(batch)


def test_a_rank_in_a_call_that_does_not_return_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    def train() -> None:
        start()
        Waiting(**tiny_parts()).train(tiny_data(), num_epochs=9, per_device_batch_size=2)

    with pytest.raises(RankFailed, match=r"rank 1: (?s:.*)KeyError: 'on purpose'|" + ENDED):
        run_ranks(train, 2, timeout=30, may_die={1})
    output = capfd.readouterr().err
    assert re.search(r"train_step\n +time.sleep\(60\)\nRankFailedError: rank 1 failed after step 3: KeyError: ", output)


def test_a_rank_whose_broadcast_a_failure_interrupts_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    def send() -> None:
        distributed = start()
        tensor = torch.full((1 << 26,), 1.0 - distributed.rank)
        with distributed.propagate_failure("in a broadcast"):
            work = dist.broadcast(tensor, 0, group=distributed.group, async_op=True)
            while not tensor[0]:
                time.sleep(0.001)
            if distributed.rank == 1:
                raise KeyError("on purpose")
            assert work is not None
            work.wait()

    with pytest.raises(RankFailed, match=ENDED):
        run_ranks(send, 2, timeout=30, may_die={1})
    assert "RankFailedError: rank 1 failed in a broadcast: KeyError: 'on purpose'" in capfd.readouterr().err


def test_a_rank_that_waits_outside_of_a_block_is_not_ended() -> None:
    def wait() -> str:
        distributed = start()
        if distributed.rank == 1:
            with pytest.raises(KeyError), distributed.propagate_failure("here"):
                raise KeyError("on purpose")
        time.sleep(2.0)
        return "returned"

    assert run_ranks(wait, 2, timeout=30) == ["returned"] * 2


def test_the_watchdog_ends_with_the_accelerator() -> None:
    def count_threads() -> list[int]:
        start()
        before = [thread.name for thread in threading.enumerate()]
        release_accelerator()
        gc.collect()
        time.sleep(0.5)
        after = [thread.name for thread in threading.enumerate()]
        return [names.count("watchdog of failures") for names in (before, after)]

    assert run_ranks(count_threads, 2, timeout=30) == [[1, 0]] * 2

"""An event on one rank ends every rank, in seconds, for one named reason."""

import os
import signal
import time

import pytest
from torch import Tensor
from typing_extensions import override

from ptacc import Callback, PeerError, StepOutput, StepResult, Trainer, TrainerCore
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

SECONDS = 10.0


class Failing(Trainer):
    """Fails on one rank, in its fourth step or in an evaluation."""

    rank: int = 0
    place: str = "step"
    dies: bool = False
    is_asked: bool = False

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if self.place == "step" and self.progress.steps == 3:
            self.fail()
        return super().train_step(batch)

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        if self.place == "evaluation" and self.progress.steps >= 3:
            self.fail()
        return super().eval_step(batch)

    def fail(self) -> None:
        if self.peers.rank != self.rank:
            return
        if self.is_asked:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyError("on purpose")


def train(rank: int, place: str, dies: bool) -> tuple[str, str, float]:
    trainer = Failing(**tiny_parts(), rank=rank, place=place, dies=dies)
    started = time.monotonic()
    try:
        trainer.train(tiny_data(24), tiny_data(24), num_epochs=3, per_device_batch_size=4)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", time.monotonic() - started


@pytest.mark.parametrize("place", ["step", "evaluation"])
@pytest.mark.parametrize(("world_size", "rank"), [(2, 0), (2, 1), (3, 1)])
def test_an_exception_ends_every_rank_under_its_name(world_size: int, rank: int, place: str) -> None:
    results = run_ranks(train, world_size, rank, place, False, timeout=30)
    assert results[rank][0] == "KeyError"
    for number, (kind, message, seconds) in enumerate(results):
        assert seconds < SECONDS
        if number != rank:
            assert kind == "PeerError"
            assert f"rank {rank} failed" in message
            assert "KeyError: 'on purpose'" in message


@pytest.mark.parametrize("place", ["step", "evaluation"])
@pytest.mark.parametrize(("world_size", "rank"), [(2, 1), (3, 2), (3, 0)])
def test_a_killed_rank_is_lost_by_name(world_size: int, rank: int, place: str) -> None:
    for kind, message, seconds in run_ranks(train, world_size, rank, place, True, timeout=30, may_die={rank}):
        assert kind == "PeerError"
        assert f"rank {rank}" in message
        assert "lost" in message
        assert seconds < SECONDS


def terminate(rank: int, place: str) -> tuple[int, str | None, object, float]:
    trainer = Failing(**tiny_parts(), rank=rank, place=place, is_asked=True)
    started = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        trainer.train(tiny_data(24), tiny_data(240), num_epochs=300, per_device_batch_size=4)
    return trainer.progress.steps, trainer.history.stop_reason, caught.value.code, time.monotonic() - started


@pytest.mark.parametrize("place", ["step", "evaluation"])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_a_request_to_terminate_ends_every_rank_at_one_step(world_size: int, rank: int, place: str) -> None:
    results = run_ranks(terminate, world_size, rank, place, timeout=30)
    assert len({steps for steps, *_ in results}) == 1
    for steps, reason, code, seconds in results:
        assert (reason, code) == (f"SIGTERM on rank {rank}", 143)
        assert steps < 40
        assert seconds < SECONDS


def test_a_handler_of_the_users_own_is_called_and_put_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit):
            Failing(**tiny_parts(), is_asked=True).train(tiny_data(24), num_epochs=9)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def fail_and_try_again() -> str:
    trainer = Failing(**tiny_parts(), rank=1)
    with pytest.raises((KeyError, PeerError)):
        trainer.train(tiny_data(24), num_epochs=1, per_device_batch_size=2)
    with pytest.raises(PeerError, match="cannot go on together"):
        trainer.train(tiny_data(24), num_epochs=1)
    return "as it should be"


def test_processes_that_failed_do_not_go_on_together() -> None:
    assert run_ranks(fail_and_try_again, 2, timeout=30) == ["as it should be"] * 2


def hear_of_the_failure() -> list[str]:
    heard: list[str] = []

    class Hearing(Callback[TrainerCore]):
        @override
        def on_exception(self, trainer: TrainerCore, error: BaseException) -> None:
            heard.append(type(error).__name__)

        @override
        def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
            if trainer.peers.rank == 1 and step.step == 2:
                raise KeyError("in a callback")

    trainer = Trainer(**tiny_parts(), callbacks=[Hearing()])
    with pytest.raises((KeyError, PeerError)):
        trainer.train(tiny_data(24), num_epochs=2, per_device_batch_size=4)
    return heard


def test_callbacks_hear_of_their_own_error_or_of_the_peers() -> None:
    assert run_ranks(hear_of_the_failure, 2, timeout=30) == [["PeerError"], ["KeyError"]]

"""The step after which all ranks stop is a function of the step of the request, whatever the speed of the steps."""

import math
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, Minutes, StepOutput, StepResult, Steps, StopOnNonFinite, Trainer
from ptacc.errors import RankFailedError
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

REQUESTED_AT, STOPPED_AT = 7, 17
"""The first vote after step 7 is started after step 16 and read after step 17."""


class Requesting(CheckpointMixin, Trainer):
    """Requests a stop in step 7 of rank 1, with steps of random length. Rank 0 may crash or receive SIGTERM."""

    kind: str = "early stop"
    longest_step: float = 0.0
    crashes_after: int | None = None
    signalled_after: int | None = None

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        time.sleep(random.SystemRandom().uniform(0, self.longest_step))
        if self.crashes_after == self.progress.steps and self.distributed.rank == 0:
            raise KeyError("crash")
        if self.signalled_after == self.progress.steps and self.distributed.rank == 0:
            signal.raise_signal(signal.SIGTERM)
        output = super().train_step(batch)
        is_bad = self.kind == "NaN" and self.distributed.rank == 1 and self.progress.steps + 1 == REQUESTED_AT
        return StepOutput(output.loss * math.nan, output.outputs) if is_bad else output

    @override
    def should_stop(self) -> str | None:
        has_reason = self.kind == "early stop" and self.distributed.rank == 1 and self.progress.steps == REQUESTED_AT
        return super().should_stop() or ("early stop" if has_reason else None)


class StoppingCallback(Callback[Requesting]):
    @override
    def on_step_end(self, trainer: Requesting, step: StepResult) -> None:
        if trainer.kind == "callback" and trainer.distributed.rank == 1 and step.step == REQUESTED_AT:
            trainer.stop("callback")


def train(trainer: Requesting) -> tuple[int, str | None]:
    history = trainer.train(tiny_data(240), max_steps=60, per_device_batch_size=2)
    return trainer.progress.steps, history.stop_reason


def stop_ten_times(kind: str, directory: Path) -> list[tuple[int, str | None]]:
    ends: list[tuple[int, str | None]] = []
    for repetition in range(10):
        trainer = Requesting(
            **tiny_parts(),
            kind=kind,
            longest_step=0.08 if repetition % 3 == 0 else 0.01,  # with votes after each few steps, and without
            checkpoint_dir=directory / str(repetition),
            checkpoint_every=Minutes(0.001) if repetition % 2 else None,
            callbacks=[StopOnNonFinite(), StoppingCallback()],
        )
        ends.append(train(trainer))
    return ends


@pytest.mark.filterwarnings("ignore:.*not saved after step")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("early stop", "early stop"), ("callback", "callback"), ("NaN", "non-finite loss at step 8")],
)
def test_the_same_request_stops_all_ranks_after_the_same_step(kind: str, reason: str, tmp_path: Path) -> None:
    assert run_ranks(stop_ten_times, 2, kind, tmp_path) == [[(STOPPED_AT, reason)] * 10] * 2


def make(directory: Path, **options: Any) -> Requesting:
    return Requesting(**tiny_parts(), checkpoint_dir=directory, checkpoint_every=Steps(1), resume=True, **options)


@pytest.mark.parametrize("crashes_after", [9, 16])
def test_a_run_resumed_after_a_crash_stops_after_the_same_step(crashes_after: int, tmp_path: Path) -> None:
    def crash() -> int:
        trainer = make(tmp_path, crashes_after=crashes_after)
        with pytest.raises((KeyError, RankFailedError)):
            train(trainer)
        return trainer.progress.steps

    assert run_ranks(crash, 2) == [crashes_after] * 2
    assert run_ranks(lambda: train(make(tmp_path)), 2) == [(STOPPED_AT, "early stop")] * 2


@pytest.mark.parametrize("signalled_after", [14, 15, 16])
def test_a_run_resumed_after_a_signal_stops_after_the_same_step(signalled_after: int, tmp_path: Path) -> None:
    def terminate() -> int:
        trainer = make(tmp_path, signalled_after=signalled_after)
        with pytest.raises(SystemExit):
            train(trainer)
        return trainer.progress.steps

    # Saves after each step wait for signals, but not for the vote that was started after step 16.
    assert run_ranks(terminate, 2) == [signalled_after + 1] * 2
    assert run_ranks(lambda: train(make(tmp_path)), 2) == [(STOPPED_AT, "early stop")] * 2


def test_max_time_stops_soon_where_steps_are_long(tmp_path: Path) -> None:
    def train_for_half_a_second(directory: Path) -> tuple[int, str | None]:
        trainer = Requesting(
            **tiny_parts(), kind="none", longest_step=0.3, checkpoint_dir=directory, checkpoint_every=None
        )
        history = trainer.train(tiny_data(240), max_time=0.5, per_device_batch_size=2)
        assert trainer.progress.seconds < 2.5
        return trainer.progress.steps, history.stop_reason

    first, second = run_ranks(train_for_half_a_second, 2, tmp_path)
    assert first == second
    assert first[1] == "max_time=0.5 reached"

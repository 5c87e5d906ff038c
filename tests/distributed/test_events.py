"""An event on one rank ends every rank within seconds, with one reason; agreed stops also at one step.

`python -m tests.distributed.test_events` prints the table of times.
"""

import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest
from torch import Tensor
from typing_extensions import override

from ptacc import Callback, EvalResult, StepOutput, StepResult, StopOnNonFinite, Trainer
from ptacc.testing import tiny_data, tiny_parts
from tests.ranks import run_ranks

SECONDS = 10.0
EVENT_AFTER = 3
REASONS = {
    "NaN": r"non-finite loss (at step \d+|in the evaluation after step \d+)",
    "early stop": r"early stop of rank {rank}",
    "callback's stop": r"callback of rank {rank}",
    "SIGTERM": r"SIGTERM on rank {rank}",
    "exception": r"rank {rank} failed .*: KeyError: 'on purpose'",
    "SIGKILL": r"rank {rank} failed .*: lost: .*",
}
PLACES = ["step", "evaluation"]


class EventTrainer(Trainer):
    """Triggers an event on one rank, in a step or in an evaluation."""

    event: str
    place: str
    rank: int
    has_stop_reason: bool = False

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        return self.trigger("step", super().train_step(batch))

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        return self.trigger("evaluation", super().eval_step(batch))

    def trigger(self, place: str, output: StepOutput[Tensor]) -> StepOutput[Tensor]:
        if (place, self.rank) != (self.place, self._distributed.rank) or self.progress.steps < EVENT_AFTER:
            return output
        if self.event == "exception":
            raise KeyError("on purpose")
        if self.event in ("SIGKILL", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, self.event))
        self.has_stop_reason = self.event == "early stop"
        return StepOutput(output.loss * math.nan, output.outputs) if self.event == "NaN" else output

    @override
    def should_stop(self) -> str | None:
        return super().should_stop() or (f"early stop of rank {self.rank}" if self.has_stop_reason else None)


class Stopping(Callback[EventTrainer]):
    @override
    def on_step_end(self, trainer: EventTrainer, step: StepResult) -> None:
        self.stop(trainer, "step")

    @override
    def on_evaluation_end(self, trainer: EventTrainer, name: str, result: EvalResult) -> None:
        self.stop(trainer, "evaluation")

    def stop(self, trainer: EventTrainer, place: str) -> None:
        is_event = (trainer.event, trainer.place, trainer.rank) == ("callback's stop", place, trainer.distributed.rank)
        if is_event and trainer.progress.steps >= EVENT_AFTER:
            trainer.stop(f"callback of rank {trainer.rank}")


@dataclass(frozen=True)
class End:
    """The end of a rank: its step, the reason, the exit code or the type of the error, and the time in seconds."""

    step: int
    reason: str
    how: str
    seconds: float


def train_until_event(event: str, place: str, rank: int) -> End:
    callbacks: list[Callback[EventTrainer]] = [StopOnNonFinite(), Stopping()]
    trainer = EventTrainer(**tiny_parts(), event=event, place=place, rank=rank, callbacks=callbacks)
    started, reason, how = time.monotonic(), "", "returned"
    try:
        trainer.train(tiny_data(24), tiny_data(240), num_epochs=99, per_device_batch_size=4)
    except SystemExit as error:
        how = f"exit {error.code}"
    except Exception as error:
        reason, how = str(error), type(error).__name__
    seconds = time.monotonic() - started
    return End(trainer.progress.steps, trainer.history.stop_reason or reason, how, seconds)


def check_ends(ends: list[End], event: str, rank: int) -> None:
    """Check that all ranks that were not killed ended in the same way."""
    expected = {"SIGTERM": "exit 143", "exception": "RankFailedError", "SIGKILL": "RankFailedError"}.get(
        event, "returned"
    )
    for number, end in enumerate(ends):
        assert end.seconds < SECONDS
        if (event, number) == ("exception", rank):
            assert (end.how, end.reason) == ("KeyError", "'on purpose'")
        else:
            assert end.how == expected
            assert re.fullmatch(REASONS[event].replace("{rank}", str(rank)), end.reason)
    if expected != "RankFailedError":
        assert len({(end.step, end.reason) for end in ends}) == 1
        assert EVENT_AFTER <= ends[0].step < 60


def run_event(event: str, place: str, world_size: int, rank: int) -> list[End]:
    may_die = {rank} if event == "SIGKILL" else set()
    return run_ranks(train_until_event, world_size, event, place, rank, timeout=30, may_die=may_die)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("event", REASONS)
@pytest.mark.parametrize(("world_size", "rank"), [(2, 1), (3, 0)])
def test_an_event_on_one_rank_ends_all_ranks(world_size: int, rank: int, event: str, place: str) -> None:
    check_ends(run_event(event, place, world_size, rank), event, rank)


SIZES = (2, 3, 4)
GRID = [(event, place, size, rank) for event, place, size in product(REASONS, PLACES, SIZES) for rank in range(size)]


@pytest.mark.prove
@pytest.mark.parametrize(("event", "place", "world_size", "rank"), GRID)
def test_on_every_rank(event: str, place: str, world_size: int, rank: int) -> None:
    check_ends(run_event(event, place, world_size, rank), event, rank)


def run_on_one_process(event: str, place: str) -> End:
    return run_ranks(train_until_event, 1, event, place, 0, timeout=30)[0]


@pytest.mark.parametrize("event", ["NaN", "early stop", "callback's stop", "SIGTERM"])
def test_a_single_process_ends_after_its_step(event: str) -> None:
    assert run_on_one_process(event, "step").step == EVENT_AFTER + (event != "callback's stop")


def table() -> Iterator[str]:
    """Yield the longest time in which a rank ended, for each event and place, over all ranks with the event."""
    yield f"{'event':16} {'place':11}" + "".join(f"{size} processes".rjust(13) for size in SIZES)
    for event, place in product(REASONS, PLACES):
        row = f"{event:16} {place:11}"
        for size in SIZES:
            slowest = 0.0
            for rank in range(size):
                ends = run_event(event, place, size, rank)
                check_ends(ends, event, rank)
                slowest = max(slowest, *(end.seconds for end in ends))
            row += f"{slowest:11.2f} s"
        yield row


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

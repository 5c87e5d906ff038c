"""What befalls one rank ends every rank, in seconds, for one named reason: agreed stops at one step.

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
STRIKES_AFTER = 3
REASONS = {
    "NaN": r"non-finite loss (at step \d+|in the evaluation after step \d+)",
    "early stop": r"rank {rank} has seen enough",
    "callback's stop": r"a callback on rank {rank} has",
    "SIGTERM": r"SIGTERM on rank {rank}",
    "exception": r"rank {rank} failed .*: KeyError: 'on purpose'",
    "SIGKILL": r"rank {rank} failed .*: lost: .*",
}
PLACES = ["step", "evaluation"]


class Struck(Trainer):
    """Is struck by an event on one rank, in a step or in an evaluation."""

    event: str
    place: str
    rank: int
    has_seen_enough: bool = False

    @override
    def train_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        return self.struck("step", super().train_step(batch))

    @override
    def eval_step(self, batch: tuple[Tensor, Tensor]) -> StepOutput[Tensor]:
        return self.struck("evaluation", super().eval_step(batch))

    def struck(self, place: str, output: StepOutput[Tensor]) -> StepOutput[Tensor]:
        if (place, self.rank) != (self.place, self._distributed.rank) or self.progress.steps < STRIKES_AFTER:
            return output
        if self.event == "exception":
            raise KeyError("on purpose")
        if self.event in ("SIGKILL", "SIGTERM"):
            os.kill(os.getpid(), getattr(signal, self.event))
        self.has_seen_enough = self.event == "early stop"
        return StepOutput(output.loss * math.nan, output.outputs) if self.event == "NaN" else output

    @override
    def should_stop(self) -> str | None:
        return super().should_stop() or (f"rank {self.rank} has seen enough" if self.has_seen_enough else None)


class Stopping(Callback[Struck]):
    @override
    def on_step_end(self, trainer: Struck, step: StepResult) -> None:
        self.stop(trainer, "step")

    @override
    def on_evaluation_end(self, trainer: Struck, name: str, result: EvalResult) -> None:
        self.stop(trainer, "evaluation")

    def stop(self, trainer: Struck, place: str) -> None:
        is_struck = (trainer.event, trainer.place, trainer.rank) == ("callback's stop", place, trainer.distributed.rank)
        if is_struck and trainer.progress.steps >= STRIKES_AFTER:
            trainer.stop(f"a callback on rank {trainer.rank} has")


@dataclass(frozen=True)
class End:
    """How a rank ended: the step, the reason, the exit code or the error's kind, and the seconds it took."""

    step: int
    reason: str
    how: str
    seconds: float


def end_of_a_run(event: str, place: str, rank: int) -> End:
    callbacks: list[Callback[Struck]] = [StopOnNonFinite(), Stopping()]
    trainer = Struck(**tiny_parts(), event=event, place=place, rank=rank, callbacks=callbacks)
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
    """Check that every rank that lives ended alike."""
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
        assert STRIKES_AFTER <= ends[0].step < 60


def strike(event: str, place: str, world_size: int, rank: int) -> list[End]:
    may_die = {rank} if event == "SIGKILL" else set()
    return run_ranks(end_of_a_run, world_size, event, place, rank, timeout=30, may_die=may_die)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("event", REASONS)
@pytest.mark.parametrize(("world_size", "rank"), [(2, 1), (3, 0)])
def test_what_befalls_one_rank_ends_all(world_size: int, rank: int, event: str, place: str) -> None:
    check_ends(strike(event, place, world_size, rank), event, rank)


SIZES = (2, 3, 4)
GRID = [(event, place, size, rank) for event, place, size in product(REASONS, PLACES, SIZES) for rank in range(size)]


@pytest.mark.prove
@pytest.mark.parametrize(("event", "place", "world_size", "rank"), GRID)
def test_on_every_rank(event: str, place: str, world_size: int, rank: int) -> None:
    check_ends(strike(event, place, world_size, rank), event, rank)


def one_process(event: str, place: str) -> End:
    return run_ranks(end_of_a_run, 1, event, place, 0, timeout=30)[0]


@pytest.mark.parametrize("event", ["NaN", "early stop", "callback's stop", "SIGTERM"])
def test_a_process_by_itself_ends_at_once(event: str) -> None:
    assert one_process(event, "step").step == STRIKES_AFTER + (event != "callback's stop")


def table() -> Iterator[str]:
    """Yield, for each event and place, the longest time in which any rank ended, over all ranks struck."""
    yield f"{'event':16} {'place':11}" + "".join(f"{size} processes".rjust(13) for size in SIZES)
    for event, place in product(REASONS, PLACES):
        row = f"{event:16} {place:11}"
        for size in SIZES:
            slowest = 0.0
            for rank in range(size):
                ends = strike(event, place, size, rank)
                check_ends(ends, event, rank)
                slowest = max(slowest, *(end.seconds for end in ends))
            row += f"{slowest:11.2f} s"
        yield row


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

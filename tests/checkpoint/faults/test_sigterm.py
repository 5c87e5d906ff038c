"""A run that gets a termination signal is saved in seconds. Resumed, it ends as one without a signal."""

import random
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ptacc import Epochs, RunPlan, Steps
from ptacc.testing import tiny_data
from tests.checkpoint.launches import Launch, StepLog
from tests.checkpoint.runs import End, KillableTrainer, check_cleaned_up, in_memory, intact_checkpoints, make, read_end
from tests.ranks import run_ranks

SECONDS = 5.0
"""How soon after a signal there has to be a checkpoint."""
SPARE = 5
"""How many requests there are more than have to be in time."""
LAST_PART = 0.96
"""The part of a run after which a signal may come too late."""


def on_plateau(optimizer: Optimizer, plan: RunPlan) -> ReduceLROnPlateau:
    """Make a schedule that every evaluation at the end of an epoch moves, but for the first."""
    return ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.5)


@dataclass(frozen=True)
class Case:
    """A run that is asked to terminate.

    Args:
        world_size: Number of its processes.
        evaluate_every: When it evaluates its two sets.
        patience: Evaluations after the first, none of them better enough, after which it stops early.
        stop_check_every: Steps between two votes.
    """

    world_size: int
    evaluate_every: Steps | Epochs
    patience: int
    stop_check_every: int = 16

    def trainer(self, directory: Path, **options: Any) -> KillableTrainer:
        return make(
            directory,
            create_scheduler=on_plateau,
            scheduler_monitor="hard/loss",
            early_stopping_monitor="easy/loss",
            early_stopping_min_delta=10.0,
            early_stopping_patience=self.patience,
            evaluation_seconds=0.004,
            resume=True,
            **options,
        )

    def train(self, directory: Path, **options: Any) -> End:
        """Train four epochs of six steps, or what is left of them, and log where the run was interrupted."""
        trainer = self.trainer(directory, **options)
        try:
            history = trainer.train(
                tiny_data(24),
                {"easy": tiny_data(12), "hard": tiny_data(20)},
                num_epochs=4,
                per_device_batch_size=4 // self.world_size,
                evaluate_every=self.evaluate_every,
                stop_check_every=self.stop_check_every,
            )
        except SystemExit:
            now = trainer.progress
            trainer.note("exit", epoch=now.epochs, offset=now.offset, reason=trainer.history.stop_reason)
            raise
        return read_end(trainer, history)


CASES = (
    Case(1, Steps(4), patience=4),
    Case(2, Steps(4), patience=2),
    Case(1, Epochs(1), patience=2),
    Case(2, Epochs(1), patience=2, stop_check_every=2),
    Case(2, Steps(4), patience=100),
)
SAVING: tuple[Mapping[str, Any], ...] = (
    {"checkpoint_every": None},
    {"checkpoint_every": Epochs(1)},
    {"checkpoint_every": Steps(5), "checkpoint_in_background": True, "keep_last": 1},
)


@dataclass(frozen=True)
class Uninterrupted:
    """What a run ends with on each process, and how many lines each logs."""

    ends: list[End]
    lines: int
    last_step: int


@dataclass
class UninterruptedRuns:
    """The uninterrupted runs of the cases, each made when it is first asked for."""

    directory: Path
    made: dict[Case, Uninterrupted] = field(default_factory=dict)

    def of(self, case: Case) -> Uninterrupted:
        if case not in self.made:
            directory = self.directory / f"{len(self.made)}"
            directory.mkdir()
            ends = run_ranks(partial(case.train, directory, trail=directory / "trail"), case.world_size)
            trail = StepLog(directory / "trail.0")
            trail.look()
            self.made[case] = Uninterrupted(ends, len(trail.lines), trail.lines[-1]["step"])
        return self.made[case]


@pytest.fixture(scope="module")
def runs() -> Iterator[UninterruptedRuns]:
    with tempfile.TemporaryDirectory(prefix="ptacc-", dir=in_memory()) as directory:
        CASES[0].train(Path(directory) / "first")  # what is imported at the first run, forked processes have then
        yield UninterruptedRuns(Path(directory))


@dataclass(frozen=True)
class Asked:
    """What came of a request to terminate.

    Args:
        seconds: From the signal to the checkpoint.
        in_evaluation: Whether it came within an evaluation.
        at_epoch_end: Whether it came between the last step of an epoch and the end of the epoch.
    """

    seconds: float
    in_evaluation: bool
    at_epoch_end: bool


@dataclass(frozen=True)
class Request:
    """A request to terminate.

    Args:
        case: The run.
        saving: Its options of checkpoints.
        number: The signal.
        ranks: Who is sent it.
        lines: The signal is sent when the first of them has logged so many lines,
        delay: and so many seconds later.
    """

    case: Case
    saving: Mapping[str, Any]
    number: signal.Signals
    ranks: tuple[int, ...]
    lines: int
    delay: float

    def make(self, directory: Path, whole: Uninterrupted) -> Asked | None:
        """Terminate a run, check what it leaves, and resume it. None if the run had ended."""
        trail = directory / "trail"
        launch = Launch(partial(self.case.train, directory, trail=trail, **self.saving), self.case.world_size, trail)
        if not launch.await_lines(self.ranks[0], self.lines):
            return None
        time.sleep(self.delay)
        sent = time.monotonic()
        for rank in self.ranks:
            launch.send(rank, self.number)
        codes = launch.exit_codes(20)
        if any(is_over(trail.before(sent), whole.last_step) for trail in launch.trails):
            return None
        assert codes == [128 + self.number] * self.case.world_size
        saved = check_saved(directory, [trail.lines for trail in launch.trails])
        ends = run_ranks(partial(self.case.train, directory, **self.saving), self.case.world_size)
        assert [end.differences(other) for end, other in zip(ends, whole.ends, strict=True)] == [[]] * len(ends)
        check_cleaned_up(directory)
        before = launch.trails[self.ranks[0]].before(sent)
        return Asked(max(saved - sent, 0.0), is_evaluating(before), is_at_epoch_end(before))


def is_over(before: list[dict[str, Any]], last_step: int) -> bool:
    """Say whether a run was past its last vote."""
    return any((line["what"], line["step"]) == ("epoch end", last_step) for line in before)


def is_evaluating(before: list[dict[str, Any]]) -> bool:
    named = [line["what"] for line in before if line["what"].startswith("evaluation ")]
    return named[-1:] == ["evaluation start"]


def is_at_epoch_end(before: list[dict[str, Any]]) -> bool:
    named = [line for line in before if line["what"] in ("step end", "step start", "epoch end")]
    return named != [] and named[-1]["what"] == "step end" and named[-1]["step"] % 6 == 0


def check_saved(directory: Path, logs: list[list[dict[str, Any]]]) -> float:
    """Check that the newest checkpoint is of where all processes agreed to stop; return when it was there."""
    exits = [lines[-1] for lines in logs]
    assert {line["what"] for line in exits} == {"exit"}
    (agreed,) = {(line["step"], line["epoch"], line["offset"], line["reason"]) for line in exits}
    newest = intact_checkpoints(directory)[0]
    assert (newest.step, newest.epoch, newest.offset) == agreed[:3]
    assert agreed[3].startswith("SIG")
    saved = [line for line in logs[0] if line["what"] == "saved"][-1]
    assert Path(saved["path"]).name == newest.name
    return float(saved["at"])


def requests(number: int, runs: UninterruptedRuns) -> Iterator[tuple[Request, Uninterrupted]]:
    """Iterate over requests to terminate, more than `number`: those of each case from all over its run."""
    chance = random.Random(0)
    turns = -(-number // len(CASES))
    for index in range(number + SPARE):
        case, turn = CASES[index % len(CASES)], index // len(CASES)
        whole = runs.of(case)
        ranks = ((0,), (1,), (0, 1))[index // 2 % 3] if case.world_size == 2 else (0,)
        yield (
            Request(
                case,
                SAVING[(index + turn) % 3],
                signal.SIGINT if index % 7 == 6 else signal.SIGTERM,
                ranks,
                1 + int(LAST_PART * whole.lines * ((turn + chance.random()) / turns % 1)),
                chance.uniform(0, 0.004),
            ),
            whole,
        )


def ask(number: int, runs: UninterruptedRuns, directory: Path) -> list[Asked]:
    """Ask runs to terminate until so many were asked in time."""
    asked: list[Asked] = []
    for index, (request, whole) in enumerate(requests(number, runs)):
        if len(asked) < number:
            answer = request.make(directory / f"{index}", whole)
            asked += [] if answer is None else [answer]
    assert len(asked) == number
    assert max(one.seconds for one in asked) < SECONDS
    return asked


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ptacc-", dir=in_memory()) as path:
        yield Path(path)


def test_runs_that_are_asked_to_terminate_resume(runs: UninterruptedRuns, directory: Path) -> None:
    asked = ask(8, runs, directory)
    assert any(one.in_evaluation for one in asked)


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_runs_that_are_asked_to_terminate_fifty_times_resume(runs: UninterruptedRuns, directory: Path) -> None:
    asked = ask(50, runs, directory)
    assert sum(one.in_evaluation for one in asked) >= 10
    assert sum(one.at_epoch_end for one in asked) >= 5


def test_a_signal_in_the_first_steps_is_handled_though_they_are_long(runs: UninterruptedRuns, directory: Path) -> None:
    trail = directory / "trail"
    case = Case(2, Epochs(1), patience=100)
    launch = Launch(partial(case.train, directory, trail=trail, step_seconds=0.4), 2, trail)
    assert launch.await_lines(1, 4)
    sent = time.monotonic()
    launch.send(1, signal.SIGTERM)
    assert launch.exit_codes(20) == [143, 143]
    assert check_saved(directory, [trail.lines for trail in launch.trails]) - sent < SECONDS / 2

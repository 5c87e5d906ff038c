"""A run that is killed at any moment and resumed ends as one that was not killed, to the last bit."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ptacc.files.filesystem import FileSystem
from tests.checkpoint.faults.disks import CALLS, Interposed, dying_at
from tests.checkpoint.launches import Launch
from tests.checkpoint.runs import (
    STEPS,
    End,
    check_cleaned_up,
    check_resumes,
    in_memory,
    intact_checkpoints,
    run_for_exit_code,
    save_each_step,
)
from tests.ranks import run_ranks

KILLED = 9
LINES = 40
"""Lines that each process of two logs at least before its last save."""


# ---- the process ends before a system call


@dataclass(frozen=True)
class Call:
    """A system call of a run's saves.

    Args:
        what: Its name, and what it is about: `"rename pending"`.
        committed: Checkpoints that were there before it.
    """

    what: str
    committed: int


def about(name: str, arguments: tuple[Any, ...]) -> str:
    """Return what a call is about: a file, a pending, what is being removed, or the directory of one."""
    first = arguments[0]
    path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else Path(first)
    kinds = {".partial-": "pending", ".removed-": "trash", "step-": "checkpoint"}
    where = [kind for part in path.parts for prefix, kind in kinds.items() if part.startswith(prefix)]
    is_file = name in ("open_new", "write", "remove_file") or path.is_file()
    file = "manifest of " if path.name == "manifest.json" else "file of " if is_file else ""
    return f"{name} {file}{where[0] if where else 'directory'}"


class Watched:
    """The calls of a run, in their order."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._committed = 0

    def record(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        what = about(name, arguments)
        self.calls.append(Call(what, self._committed))
        self._committed += what == "rename pending"


@pytest.fixture
def directory() -> Iterator[Path]:
    """Return a directory in memory: what is synced there waits for no disk."""
    with tempfile.TemporaryDirectory(prefix="ptacc-", dir=in_memory()) as path:
        yield Path(path)


@dataclass(frozen=True)
class Uninterrupted:
    end: End
    calls: list[Call]


@pytest.fixture(scope="module", params=[False, True], ids=["foreground", "background"])
def in_background(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def uninterrupted(in_background: bool, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    watched = Watched()
    directory = tmp_path_factory.mktemp("uninterrupted")
    end = save_each_step(directory, filesystem=Interposed(watched.record), checkpoint_in_background=in_background)
    assert [manifest.step for manifest in intact_checkpoints(directory)] == [STEPS, STEPS - 1]
    return Uninterrupted(end, watched.calls)


def kill_and_resume(directory: Path, number: int, whole: Uninterrupted, **options: Any) -> None:
    directory.mkdir()  # as that of the uninterrupted run, whose calls were counted
    killed = run_for_exit_code(lambda: save_each_step(directory, filesystem=dying_at(number), **options))
    assert killed == KILLED
    committed = whole.calls[number].committed
    check_resumes(directory, whole.end, committed, committed, **options)
    shutil.rmtree(directory)


def kill_at_each(numbers: Iterable[int], whole: Uninterrupted, directory: Path, **options: Any) -> set[str]:
    """Kill a run at each of some calls, and return what kinds of calls these were."""
    kinds: set[str] = set()
    for number in numbers:
        kill_and_resume(directory / f"{number}", number, whole, **options)
        kinds.add(whole.calls[number].what)
    return kinds


def one_of_each_kind(calls: list[Call]) -> Iterator[int]:
    """Iterate over the numbers of calls, one of each kind, from all parts of the run."""
    for place, what in enumerate(sorted({call.what for call in calls})):
        there = [number for number, call in enumerate(calls) if call.what == what]
        yield there[place * 7 % len(there)]


def test_the_calls_of_a_run_are_of_all_kinds(uninterrupted: Uninterrupted) -> None:
    kinds = {call.what for call in uninterrupted.calls}
    assert {what.split()[0] for what in kinds} == {*CALLS}
    assert kinds >= {"make_directory pending", "sync manifest of pending", "rename pending", "rename checkpoint"}
    assert kinds >= {"sync directory", "remove_file file of trash", "remove_directory trash"}


def test_a_run_killed_before_a_call_of_every_other_kind_resumes(
    uninterrupted: Uninterrupted, in_background: bool, directory: Path
) -> None:
    numbers = list(one_of_each_kind(uninterrupted.calls))[in_background::2]
    kinds = kill_at_each(numbers, uninterrupted, directory, checkpoint_in_background=in_background)
    assert kinds == {uninterrupted.calls[number].what for number in numbers}


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_a_run_killed_before_any_call_resumes(
    uninterrupted: Uninterrupted, in_background: bool, directory: Path
) -> None:
    numbers = range(len(uninterrupted.calls))
    assert len(numbers) >= 180
    kinds = kill_at_each(numbers, uninterrupted, directory, checkpoint_in_background=in_background)
    assert kinds == {call.what for call in uninterrupted.calls}


def test_a_run_killed_again_and_again_ends(uninterrupted: Uninterrupted, directory: Path) -> None:
    chance, kills = random.Random(0), 0
    disk = dying_at(chance.randrange(50, 150))
    while run_for_exit_code(lambda: save_each_step(directory, filesystem=disk, resume=True)) == KILLED:  # noqa: B023
        kills += 1
        disk = dying_at(chance.randrange(50, 150))
    assert kills >= 3
    check_resumes(directory, uninterrupted.end, STEPS, STEPS)


def test_a_run_killed_as_it_opens_its_directory_leaves_nothing_there(
    uninterrupted: Uninterrupted, directory: Path
) -> None:
    number = next(number for number, call in enumerate(uninterrupted.calls) if call.what == "make_directory pending")
    assert run_for_exit_code(lambda: save_each_step(directory, filesystem=dying_at(number))) == KILLED
    assert [path.name for path in (directory / "checkpoints").iterdir()] == [".lock"]
    check_resumes(directory, uninterrupted.end, 0, 0)


# ---- a process of two is killed


def save_as_one_of_two(directory: Path, trail: Path | None = None, *, dies: tuple[int, int] | None = None) -> End:
    """Train as one of two processes, of which one `dies` before a call: its rank, and the number of the call."""
    rank, number = dies or (-1, 0)
    disk = dying_at(number) if str(rank) == os.environ["RANK"] else FileSystem()
    return save_each_step(directory, trail=trail, resume=True, filesystem=disk)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[End]:
    """Return what an uninterrupted run of two processes ends with on each."""
    return run_ranks(save_as_one_of_two, 2, tmp_path_factory.mktemp("both"))


def check_both_resume(directory: Path, both: list[End], saved: int) -> None:
    """Check what a kill left of a run that had logged its checkpoint after step `saved`, and resume it."""
    left = [manifest.step for manifest in intact_checkpoints(directory)]
    assert not saved or left[0] in (saved, saved + 1)
    ends = run_ranks(save_as_one_of_two, 2, directory)
    assert [end.differences(whole) for end, whole in zip(ends, both, strict=True)] == [[], []]
    check_cleaned_up(directory)


def kill_one_of_two(directory: Path, rank: int, lines: int, chance: random.Random, both: list[End]) -> None:
    """Kill a process as soon as it has logged so many lines, or a little later; then resume the run with two."""
    trail = directory / "trail"
    launch = Launch(partial(save_as_one_of_two, directory, trail), 2, trail)
    assert launch.await_lines(rank, lines)
    time.sleep(chance.uniform(0, 0.01))
    launch.send(rank, signal.SIGKILL)
    codes = launch.exit_codes(20)
    saved = max((line["step"] for line in launch.trails[0].lines if line["what"] == "saved"), default=0)
    # Once the last checkpoint is there, the other process may have ended before the kill.
    assert (codes[rank], codes[1 - rank]) in [(-signal.SIGKILL, 1), *([(-signal.SIGKILL, 0)] if saved == STEPS else [])]
    check_both_resume(directory, both, saved)


def kill_in_turn(times: int, directory: Path, both: list[End]) -> None:
    """Kill processes in turn, at moments from all over the run."""
    chance = random.Random(0)
    for turn in range(times):
        lines = 1 + int(LINES * (turn + chance.random()) / times)
        kill_one_of_two(directory / f"{turn}", turn % 2, lines, chance, both)


def test_two_processes_one_of_which_is_killed_resume(directory: Path, both: list[End]) -> None:
    kill_in_turn(2, directory, both)


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_two_processes_one_of_which_is_killed_twenty_times_resume(directory: Path, both: list[End]) -> None:
    kill_in_turn(20, directory, both)


def die_within_a_save(directory: Path, rank: int, number: int, both: list[End]) -> None:
    trail = directory / "trail"
    launch = Launch(partial(save_as_one_of_two, directory, trail, dies=(rank, number)), 2, trail)
    codes = launch.exit_codes(20)
    assert (codes[rank], codes[1 - rank]) == (KILLED, 1)
    saved = [line["step"] for line in launch.trails[0].lines if line["what"] == "saved"]
    check_both_resume(directory, both, max(saved, default=0))


def test_no_process_waits_for_a_process_that_was_killed_within_a_save(directory: Path, both: list[End]) -> None:
    die_within_a_save(directory, 1, 20, both)


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_no_process_waits_for_a_process_that_was_killed_anywhere_within_a_save(
    directory: Path, both: list[End]
) -> None:
    for number in range(1, 50, 3):
        die_within_a_save(directory / f"{number}", number // 3 % 2, number, both)

"""Rendezvous: what all processes have to call, they call together, or hear by name that they did not.

A process that comes to a collective alone would wait for ever, or take the numbers of another collective for its own.
So each one that users call begins with a meeting in the rendezvous store: who is here, for which call, and has
anything gone wrong? Nobody is given up by the clock, as another process may have long work to do first. A process
that waits looks for proof that one it waits for cannot come any more: it is gone, it failed, or it went past the
place. For the last, each process marks its way where the others of its host can read it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from ptacc.distributed.failure import FailureMonitor, host_identity
from ptacc.errors import CollectiveError, RankFailedError

FIRST_PAUSE, LONGEST_PAUSE = 0.0002, 0.01
"""Seconds between two looks at the store; they double."""
LOOK_EVERY = 0.1
"""Seconds to wait for the others before it is looked whether they can still come."""
PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"


class ProgressCounter:
    """How often this process passed a place that all processes pass alike: a number that its host can read.

    It is even; odd after a place that some may pass by on their way to the next, which is even again for all.
    Marking costs a tenth of a microsecond. Where the system has no such memory, nobody reads it.
    """

    def __init__(self) -> None:
        """Start at 0."""
        self.path: str | None = None
        self._memory: mmap.mmap | bytearray = bytearray(8)
        if sys.platform == "linux":
            descriptor = os.memfd_create("ptacc-trail")
            os.ftruncate(descriptor, 8)
            self._memory = mmap.mmap(descriptor, 8)
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._marks = memoryview(self._memory).cast("Q")

    def increment(self) -> None:
        """Pass a place that nobody passes by."""
        self._marks[0] = (self._marks[0] | 1) + 1

    def half_step(self) -> None:
        """Pass a place on the way to the next."""
        self._marks[0] |= 1

    @property
    def value(self) -> int:
        """How far this process is."""
        return self._marks[0]


def read_counter(path: str) -> int:
    """Return the marks of another process of this host, -1 where they cannot be read."""
    try:
        return int.from_bytes(Path(path).read_bytes(), sys.byteorder)
    except OSError:
        return -1


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What a process says at a meeting.

    Args:
        call: What it called.
        place: Where in the user's code.
        error: What went wrong on it before.
    """

    call: str
    place: str
    error: str | None


class Rendezvous:
    """The meetings of a launch's processes, numbered alike on each."""

    def __init__(self, board: FailureMonitor) -> None:
        """Meet in the store of `failures`. A collective: every process makes the same call."""
        self._board, self._store = board, board.store
        self._rank, self._held = board.rank, 0
        self._kept: list[int] = []
        self.inside = ""
        self.progress = ProgressCounter()
        self._store.set(f"trail/{self._rank}", json.dumps([host_identity(), self.progress.path]))

    def sync(self, call: str, ranks: Sequence[int] | None = None, error: str | None = None) -> None:
        """Wait until all of `ranks` make the same call: all processes, if not given.

        Raises:
            CollectiveError: A process made another call, or went past the place without one.
            RankFailedError: A process was lost, or brings an error with it.
        """
        self._board.check()
        everyone = range(self._board.world_size)
        ranks = everyone if ranks is None else ranks
        mine = CallRecord(call, user_location(), error)
        self._publish(mine)
        try:
            self._wait(mine, ranks)
            words = [self._read_record(rank) for rank in ranks]
        except RuntimeError as failure:
            if isinstance(failure, RankFailedError | CollectiveError):
                raise
            raise RankFailedError("lost rank 0: its rendezvous store does not answer") from failure
        if len(ranks) == len(everyone):
            self._delete_old_records()
        for rank, word in zip(ranks, words, strict=True):
            if word.error is not None and rank != self._rank:
                raise RankFailedError(f"rank {rank} failed in {word.call} ({word.place}): {word.error}")
        for rank, word in zip(ranks, words, strict=True):
            check_same_call(self._rank, mine, rank, word)

    @contextlib.contextmanager
    def _marking_call(self, call: str) -> Iterator[None]:
        """Say in `inside` that a call is under way."""
        self.inside = call
        try:
            yield
        finally:
            self.inside = ""

    def local_ranks(self) -> list[int]:
        """Return the ranks of this host's processes."""
        return [rank for rank in range(self._board.world_size) if self._counter_path(rank) is not None]

    def _publish(self, word: CallRecord) -> None:
        self._held += 1
        self._store.set(self._record_key(self._rank), json.dumps(astuple(word)))
        self._kept.append(self._held)

    def _delete_old_records(self) -> None:
        """Take this process's former words out of the store: everyone is here, and so has left those meetings."""
        for number in self._kept[:-1]:
            self._store.delete_key(f"meeting/{number}/{self._rank}")
        del self._kept[:-1]

    def _record_key(self, rank: int) -> str:
        return f"meeting/{self._held}/{rank}"

    def _read_record(self, rank: int) -> CallRecord:
        return CallRecord(*json.loads(self._store.get(self._record_key(rank))))

    def _wait(self, mine: CallRecord, ranks: Sequence[int]) -> None:
        keys = [self._record_key(rank) for rank in ranks]
        pause, looked = FIRST_PAUSE, time.monotonic()
        while not self._store.check(keys):
            if time.monotonic() - looked > LOOK_EVERY:
                self._check_reachable(mine, ranks)
                looked = time.monotonic()
            time.sleep(pause)  # the store's own waiting prints a warning each time that it ends without an answer
            pause = min(2 * pause, LONGEST_PAUSE)

    def _check_reachable(self, mine: CallRecord, ranks: Sequence[int]) -> None:
        """Raise where one of `ranks` cannot come any more."""
        failure = self._board.find_failure()
        for rank in ranks:
            path = self._counter_path(rank)
            marks = read_counter(path) if path else -1  # before the next line: it may come, and go on, in between
            if self._store.check([self._record_key(rank)]):
                check_same_call(self._rank, mine, rank, self._read_record(rank))
            elif failure is not None:
                self._board.failure = failure
                raise RankFailedError(str(failure))
            elif marks > self.progress.value:
                error = CollectiveError(
                    f"{mine.call} was called on rank {self._rank} ({mine.place}), and rank {rank} went on without it. "
                    "Call it on every process: not under a condition that only some of them meet."
                )
                self._board.report_failure(f"in {mine.call}", error)  # the others wait for this process elsewhere
                raise error

    def _counter_path(self, rank: int) -> str | None:
        """Return where the marks of a process are, None where it is on another host."""
        host, path = json.loads(self._store.get(f"trail/{rank}"))
        return (path or "") if host == host_identity() else None


def check_same_call(rank: int, mine: CallRecord, other: int, theirs: CallRecord) -> None:
    """Raise where two processes came to one meeting for different calls."""
    if mine.call != theirs.call:
        raise CollectiveError(
            f"{mine.call} was called on rank {rank} ({mine.place}), and {theirs.call} on rank {other} "
            f"({theirs.place}). All processes make these calls alike: in the same order, with the same options, and "
            "with data of the same size."
        )


def user_location() -> str:
    """Return the file and line of the code that called into this package."""
    frame = sys._getframe(1)  # noqa: SLF001  # the documented way to a caller, for all its name
    while frame.f_back is not None and is_internal_file(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def is_internal_file(file: str) -> bool:
    """Say whether a file is part of this package, or a context manager that stands between it and its users."""
    return file.startswith(PACKAGE) or file.endswith("contextlib.py")

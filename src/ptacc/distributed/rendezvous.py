"""Points that all ranks must reach with the same call, with errors in place of deadlocks.

A rank that makes a collective call alone would wait forever, or match it with a different collective of another rank.
Each collective call of the public interface therefore starts with `Rendezvous.sync`: every rank writes a record of its
call to the rendezvous store, waits for the records of the others, and compares them.

A wait does not time out, because another rank may legitimately be busy for a long time. A waiting rank instead checks
whether the missing ranks can still arrive. A rank cannot if it has failed, if its process has ended, or if it has
passed this point without the call. For the last case each rank counts its progress in shared memory, which the other
ranks of the same host can read.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from ptacc.distributed.failure import FailureMonitor, host_identity
from ptacc.errors import CollectiveError, RankFailedError

MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.0002, 0.01
"""Time between two polls of the store. It doubles from the minimum to the maximum."""
CHECK_SECONDS = 0.1
"""Time between two checks of whether the missing ranks can still arrive."""
PACKAGE = f"{Path(__file__).parent.parent}{os.sep}"


class ProgressCounter:
    """The progress of this rank, as a number that other processes of the host can read.

    `increment` marks a place that every rank passes, and makes the number even. `half_step` marks a place between two
    of these that a rank may skip, and makes it odd. A rank with a larger number than a waiting rank has therefore
    passed the place where that one waits. Each call takes 0.1 microseconds. Only Linux has the shared memory.
    """

    def __init__(self) -> None:
        self.path: str | None = None
        self._memory: mmap.mmap | bytearray = bytearray(8)
        if sys.platform == "linux":
            descriptor = os.memfd_create("ptacc-progress")
            os.ftruncate(descriptor, 8)
            self._memory = mmap.mmap(descriptor, 8)
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._count = memoryview(self._memory).cast("Q")

    def increment(self) -> None:
        """Advance to the next even number."""
        self._count[0] = (self._count[0] | 1) + 1

    def half_step(self) -> None:
        """Advance to the next odd number, unless the number is odd."""
        self._count[0] |= 1

    @property
    def value(self) -> int:
        """The number."""
        return self._count[0]


def read_counter(path: str) -> int:
    """Return the number of another process of this host; -1 if it cannot be read."""
    try:
        return int.from_bytes(Path(path).read_bytes(), sys.byteorder)
    except OSError:
        return -1


@dataclass(frozen=True, slots=True)
class CallRecord:
    """The record of a call.

    Args:
        call: The call, with its arguments.
        place: File and line in the user's code.
        error: The error of this rank before the call, if any.
    """

    call: str
    place: str
    error: str | None


class Rendezvous:
    """The synchronised calls of the ranks, which every rank counts alike.

    Attributes:
        progress: Progress of this rank.
        current_call: The call whose block is running; empty if none.

    Args:
        monitor: The failures of the ranks. Every rank constructs its rendezvous at the same point.
    """

    def __init__(self, monitor: FailureMonitor) -> None:
        self._monitor, self._store, self._rank = monitor, monitor.store, monitor.rank
        self._calls = 0
        self._stored: list[int] = []
        self.current_call = ""
        self.progress: ProgressCounter = ProgressCounter()
        self._store.set(f"counter/{self._rank}", json.dumps([host_identity(), self.progress.path]))

    def sync(self, call: str, ranks: Sequence[int] | None = None, error: str | None = None) -> None:
        """Wait until all of `ranks` make the same call; all ranks by default.

        Args:
            call: The call, with all arguments that must be equal.
            ranks: The ranks that make the call.
            error: An error of this rank, to be raised on the others.

        Raises:
            CollectiveError: A rank made another call, or passed this point without one.
            RankFailedError: A rank was lost, or reports an error.
        """
        self._monitor.check()
        all_ranks = range(self._monitor.world_size)
        ranks = all_ranks if ranks is None else ranks
        own = CallRecord(call, user_location(), error)
        self._calls += 1
        self._store.set(self._record_key(self._rank), json.dumps(astuple(own)))
        self._stored.append(self._calls)
        try:
            self._wait(own, ranks)
            records = {rank: self._read_record(rank) for rank in ranks}
        except (RankFailedError, CollectiveError):
            raise
        except RuntimeError as failure:
            raise RankFailedError("lost rank 0: its rendezvous store does not answer") from failure
        if len(ranks) == len(all_ranks):  # all of them are at this call, and have read the records of earlier ones
            for number in self._stored[:-1]:
                self._store.delete_key(f"call/{number}/{self._rank}")
            del self._stored[:-1]
        for rank, record in records.items():
            if record.error is not None and rank != self._rank:
                raise RankFailedError(f"rank {rank} failed in {record.call} ({record.place}): {record.error}")
        for rank, record in records.items():
            check_same_call(self._rank, own, rank, record)

    def local_ranks(self) -> list[int]:
        """Return the ranks on this host."""
        return [rank for rank in range(self._monitor.world_size) if self._counter_path(rank) is not None]

    def _record_key(self, rank: int) -> str:
        return f"call/{self._calls}/{rank}"

    def _read_record(self, rank: int) -> CallRecord:
        return CallRecord(*json.loads(self._store.get(self._record_key(rank))))

    def _wait(self, own: CallRecord, ranks: Sequence[int]) -> None:
        keys = [self._record_key(rank) for rank in ranks]
        pause, checked = MIN_POLL_SECONDS, time.monotonic()
        while not self._store.check(keys):
            if time.monotonic() - checked > CHECK_SECONDS:
                self._check_reachable(own, ranks)
                checked = time.monotonic()
            time.sleep(pause)  # polls, because `store.wait` prints a warning each time that it times out
            pause = min(2 * pause, MAX_POLL_SECONDS)

    def _check_reachable(self, own: CallRecord, ranks: Sequence[int]) -> None:
        """Raise if one of `ranks` can no longer arrive."""
        failure = self._monitor.find_failure()
        for rank in ranks:
            path = self._counter_path(rank)
            progress = read_counter(path) if path else -1  # before its record: it may arrive and continue in between
            if self._store.check([self._record_key(rank)]):
                check_same_call(self._rank, own, rank, self._read_record(rank))
            elif failure is not None:
                self._monitor.accept_failure(failure)
                raise RankFailedError(str(failure))
            elif progress > self.progress.value:
                error = CollectiveError(
                    f"{own.call} was called on rank {self._rank} ({own.place}), and rank {rank} continued without it. "
                    "Call it on every process: not under a condition that only some of them meet."
                )
                self._monitor.report_failure(f"in {own.call}", error)  # the others wait for this rank elsewhere
                raise error

    def _counter_path(self, rank: int) -> str | None:
        """Return the path of a rank's progress counter, empty if it has none; None if it is on another host."""
        host, path = json.loads(self._store.get(f"counter/{rank}"))
        return (path or "") if host == host_identity() else None


def check_same_call(rank: int, own: CallRecord, other_rank: int, other: CallRecord) -> None:
    """Raise `CollectiveError` if two ranks made different calls."""
    if own.call != other.call:
        raise CollectiveError(
            f"{own.call} was called on rank {rank} ({own.place}), and {other.call} on rank {other_rank} "
            f"({other.place}). All processes make these calls alike: in the same order, with the same options, and "
            "with data of the same size."
        )


def user_location() -> str:
    """Return the file and line of the code that called into this package, possibly through `contextlib`."""
    frame = sys._getframe(1)  # noqa: SLF001  # documented, in spite of the underscore
    while frame.f_back is not None and frame.f_code.co_filename.startswith((PACKAGE, contextlib.__file__)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"

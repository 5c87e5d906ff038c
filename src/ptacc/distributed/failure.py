"""Propagation of failures: an exception on one rank ends all ranks, which raise an error that names it.

A rank that raises cannot report that in a collective, since the others may be waiting in another one. It writes its
rank, its place and its error to the rendezvous store, and closes its TCP connections to the other ranks for sending.
The collectives in which these wait then raise, and they read the cause from the store. `watchdog.py` ends a rank that
waits in a call that does not raise.

A process that is killed writes nothing. The kernel closes its connections, so that collectives raise as well. The
others find that its process has ended, if it runs on the same host, or that it does not answer in time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Generator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeAlias

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from typing_extensions import override

from ptacc.errors import PtaccError, RankFailedError

ANSWER_SECONDS = 3.0
"""Time in which the other ranks have to answer after a connection was closed."""
CLOSING_SECONDS = 1.0
"""Time in which the kernel closes all connections of a process that has ended."""
FAILURE_KEY = "failure"
UNKNOWN_PLACE = "at an unknown place"
Ends: TypeAlias = tuple[tuple[str, int], tuple[str, int]]


class CoordinatedExit(BaseException):
    """Leaves a block on all ranks, by agreement. Not an `Exception`, so that users' handlers do not catch it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of a rank.

    Args:
        rank: The rank.
        where: What it was doing.
        what: Its error.
    """

    rank: int
    where: str
    what: str

    @override
    def __str__(self) -> str:
        return f"rank {self.rank} failed {self.where}: {self.what}"


class FailureMonitor:
    """Reports failures of this rank to the others, and finds theirs, through keys in the rendezvous store.

    Args:
        group: A process group of all ranks.
        connections: The TCP connections to the other ranks, as (file descriptor, inode).
    """

    def __init__(self, group: dist.ProcessGroup, connections: frozenset[tuple[int, int]]) -> None:
        self.store: Store = group.get_group_store()
        self.rank: int = group.rank()
        self.world_size: int = group.size()
        self._connections = connections
        self.failure: Failure | None = None
        self._open_blocks = 0
        self.store.set(f"process/{self.rank}", json.dumps([host_identity(), os.getpid()]))

    @contextlib.contextmanager
    def propagate_failure(self, where: str | Callable[[], str]) -> Generator[None]:
        """Report an exception of the block to all ranks. Blocks may be nested.

        Args:
            where: What this rank is doing, for the message on the others.

        Raises:
            RankFailedError: Another rank failed, or was killed.
        """
        self.check()
        self._open_blocks += 1
        try:
            yield
        except (CoordinatedExit, GeneratorExit):  # GeneratorExit: the user stopped reading a stream of predictions
            raise
        except BaseException as error:
            if self.failure is not None:  # an inner block has reported it
                raise
            cause = self._await_cause() if self._is_broken_collective(error) else None
            if cause is None:
                self.report_failure(where if isinstance(where, str) else where(), error)
                raise
            self.failure = cause
            raise RankFailedError(str(cause)) from error
        finally:
            self._open_blocks -= 1

    def check(self) -> None:
        """Raise `RankFailedError` if a rank of this launch has failed before."""
        if self.failure is not None:
            raise RankFailedError(
                f"The processes of this launch cannot continue together: {self.failure}. Start them again."
            )

    def report_failure(self, where: str, error: BaseException) -> None:
        """Report an error of this rank to the others, and interrupt the collectives in which they wait."""
        self.failure = Failure(self.rank, where, f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the store ends with rank 0, which the others find instead
            self._store_failure(self.failure)
        self._close_connections()

    def accept_failure(self, failure: Failure) -> None:
        """Take over the failure of another rank, and interrupt the collectives in which others wait for this rank."""
        self.failure = failure
        self._close_connections()

    def find_unseen_failure(self) -> Failure | None:
        """Return the failure of another rank while this one is within a block, in which it has not been raised."""
        return self._find_reported_failure() if self._open_blocks and self.failure is None else None

    def find_failure(self) -> Failure | None:
        """Return the failure of another rank: one that was reported, or that its process on this host has ended."""
        if (reported := self._find_reported_failure()) is not None:
            return reported
        for rank in self._other_ranks():
            host, process = json.loads(self.store.get(f"process/{rank}"))
            if host == host_identity() and not is_running(process):
                failure = Failure(rank, UNKNOWN_PLACE, "lost: its process has ended, or was killed")
                self._store_failure(failure)  # for ranks on other hosts, which cannot see that process
                return failure
        return None

    def _find_reported_failure(self) -> Failure | None:
        """Return the first failure that was reported, unless it is of this rank."""
        failure = Failure(*json.loads(self.store.get(FAILURE_KEY))) if self.store.check([FAILURE_KEY]) else None
        return None if failure is None or failure.rank == self.rank else failure

    def _is_broken_collective(self, error: BaseException) -> bool:
        """Return whether a collective raised the error because another rank is gone, or did not answer in time.

        gloo then closes its connection to that rank. Its errors have no type of their own, and any text can stand in
        an error of the user's code. The connections of a group that a library has made are not known here: those
        that are known close at almost the same time.
        """
        if isinstance(error, dist.DistError):
            return True
        if not isinstance(error, RuntimeError) or isinstance(error, PtaccError):
            return False
        deadline = time.monotonic() + (CLOSING_SECONDS if was_raised_by(error, "torch.distributed") else 0.0)
        while not any(is_closed(*connection) for connection in self._connections):
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True

    def _await_cause(self) -> Failure | None:
        """Return the failure that broke a collective; None if all ranks answer and report none."""
        try:
            self._close_connections()  # the others may be waiting for this rank: they come here as well
            self.store.set(f"alive/{self.rank}", "yes")
            deadline = time.monotonic() + ANSWER_SECONDS
            while True:
                failure = self.find_failure()
                silent = [rank for rank in self._other_ranks() if not self.store.check([f"alive/{rank}"])]
                if failure is not None or not silent:
                    return failure
                if time.monotonic() > deadline:
                    return Failure(silent[0], UNKNOWN_PLACE, f"lost: no answer in {ANSWER_SECONDS:g} s")
                time.sleep(0.02)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            return Failure(0, UNKNOWN_PLACE, f"lost: its rendezvous store does not answer: {first_line}")

    def _store_failure(self, failure: Failure) -> None:
        self.store.compare_set(FAILURE_KEY, "", json.dumps(astuple(failure)))  # keeps an earlier one

    def _close_connections(self) -> None:
        for connection in self._connections:
            close_for_sending(*connection)

    def _other_ranks(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]


@functools.cache
def host_identity() -> str:
    """Return a name shared by the processes that see each other's process ids: a host name may not be unique."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid_namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}/{boot_id}/{pid_namespace}"


def is_running(process: int) -> bool:
    """Return whether a process of this host is running. A zombie is not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:  # running where the system has no /proc, and ended since `kill` where it has
        return not Path("/proc/self").exists()
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return state not in "ZX"


def was_raised_by(error: BaseException, package: str) -> bool:
    """Return whether the last function that an error was raised in is one of a package."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith(f"{package}.")


def is_closed(descriptor: int, inode: int) -> bool:
    """Return whether this process or the other end has closed a connection."""
    try:
        if os.fstat(descriptor).st_ino != inode:  # the descriptor was reused
            return True
    except OSError:
        return True
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def close_for_sending(descriptor: int, inode: int) -> None:
    """Close a connection for sending, unless the descriptor was reused. The other end reads an end of file.

    The other end can still send. If it could not, and sent at this moment, it would wait for gloo's timeout of 30
    minutes: an operation whose send failed is left out when the end of file interrupts the pending ones.

    Source: https://github.com/pytorch/gloo/blob/70dc360/gloo/transport/tcp/pair.cc (`Pair::signalException`)
    """
    with contextlib.suppress(OSError):
        if os.fstat(descriptor).st_ino == inode:
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_WR)


def find_peer_connections(group: dist.ProcessGroup) -> frozenset[tuple[int, int]]:
    """Return the TCP connections between this process and other ranks, as (file descriptor, inode). A collective."""
    own = {connection: ends for connection in open_connections() if (ends := read_ends(connection[0])) is not None}
    store, rank = group.get_group_store(), group.rank()
    store.set(f"connections/{rank}", json.dumps(list(own.values())))
    theirs = [json.loads(store.get(f"connections/{other}")) for other in range(group.size()) if other != rank]
    known = {(tuple(here), tuple(there)) for ends in theirs for here, there in ends}
    return frozenset(connection for connection, (here, there) in own.items() if (there, here) in known)


def read_ends(descriptor: int) -> Ends | None:
    """Return the address and the port of both ends of a connection, this one first; None if it was closed."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        here, there = connection.getsockname(), connection.getpeername()
        # The other end may show an IPv4 address as one of IPv6.
        return (here[0].removeprefix("::ffff:"), here[1]), (there[0].removeprefix("::ffff:"), there[1])
    return None


def open_connections() -> frozenset[tuple[int, int]]:
    """Return the TCP connections of this process, as (file descriptor, inode), without those to the store."""
    store_port = int(os.environ.get("MASTER_PORT") or 0)
    connections: set[tuple[int, int]] = set()
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    for entry in list(folder.iterdir()):
        with contextlib.suppress(OSError):
            descriptor = int(entry.name)
            status = os.fstat(descriptor)
            if stat.S_ISSOCK(status.st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if is_internet and store_port not in (connection.getsockname()[1], connection.getpeername()[1]):
                        connections.add((descriptor, status.st_ino))
    return frozenset(connections)

"""Failing together: an exception on one process ends the others, under its name, instead of leaving them waiting.

An exception cannot ride a reduction. The process that fails writes who, where and what to the rendezvous store, and
cuts its connections; whatever collective the others wait in breaks, and they find the reason in the store. A process
that was killed leaves nothing there: its connections are cut by the kernel, and it is found missing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from typing_extensions import override

from ptacc.errors import PtaccError, RankFailedError

GRACE_SECONDS = 3.0
"""How long other processes have to answer once a connection broke."""
BROKEN = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "process group")
"""Words of the errors that collectives raise when a peer is gone, or timed out."""


class CoordinatedExit(BaseException):
    """Leaves a block on all processes alike, as they agreed: no failure, and nobody's `except Exception` to stop."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What became of a process: who, where and what."""

    rank: int
    where: str
    what: str

    @override
    def __str__(self) -> str:
        return f"rank {self.rank} failed {self.where}: {self.what}"


class FailureMonitor:
    """Where the processes of a launch tell each other of their failures: keys in the rendezvous store."""

    def __init__(self, group: dist.ProcessGroup, sockets: frozenset[tuple[int, int]]) -> None:
        """Use the store of `group`.

        Args:
            group: A group of all processes.
            sockets: The connections to the other processes: file descriptor and inode.
        """
        self.store = group.get_group_store()
        self.rank, self.world_size, self._sockets = group.rank(), group.size(), sockets
        self.failure: Failure | None = None
        self.store.set(f"process/{self.rank}", json.dumps([host_identity(), os.getpid()]))

    @contextlib.contextmanager
    def propagate_failure(self, where: str | Callable[[], str]) -> Iterator[None]:
        """Let an exception of the block end all processes; blocks may be nested.

        Args:
            where: Where the process is, for the others to be told.

        Raises:
            RankFailedError: Another process failed, or was killed.
        """
        self.check()
        try:
            yield
        except (CoordinatedExit, GeneratorExit):  # the second: a stream of predictions that nobody reads on
            raise
        except BaseException as error:
            if self.failure is not None:  # told by an inner block
                raise
            peers_failure = self._await_other_failure() if is_broken_collective(error) else None
            if peers_failure is None:
                self.report_failure(where if isinstance(where, str) else where(), error)
                raise
            self.failure = peers_failure
            raise RankFailedError(str(peers_failure)) from error

    def check(self) -> None:
        """Raise `RankFailedError` if a process of this launch failed earlier."""
        if self.failure is not None:
            raise RankFailedError(
                f"The processes of this launch cannot go on together: {self.failure}. Start them anew."
            )

    def report_failure(self, where: str, error: BaseException) -> None:
        """Tell the other processes that this one failed, and break what they wait for."""
        self.failure = failure = Failure(self.rank, where, f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the store went with rank 0, and that is what the others will say
            self.store.set(f"failed/{self.rank}", json.dumps([failure.rank, failure.where, failure.what]))
        self._shut_connections()

    def _shut_connections(self) -> None:
        """Cut the connections to the other processes, so that what they wait for breaks."""
        for descriptor, inode in self._sockets:
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == inode:
                    with socket.socket(fileno=os.dup(descriptor)) as connection:
                        connection.shutdown(socket.SHUT_RDWR)

    def _await_other_failure(self) -> Failure | None:
        """Return what another process told, or that one is missing; None if all are there and none failed."""
        try:
            self.store.set(f"alive/{self.rank}", "yes")
            self._shut_connections()  # the others wait for this process, too, and come here by it
            deadline = time.monotonic() + GRACE_SECONDS
            while True:
                found = self.find_failure()
                silent = [rank for rank in self._other_ranks() if not self.store.check([f"alive/{rank}"])]
                if found is not None or not silent:
                    return found
                if time.monotonic() > deadline:
                    return Failure(silent[0], "at an unknown place", f"lost: no answer in {GRACE_SECONDS:g} s")
                time.sleep(0.02)
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            return Failure(0, "at an unknown place", f"lost: its rendezvous store does not answer: {first_line}")

    def find_failure(self) -> Failure | None:
        """Return what another process told of itself, or that one of this host is gone; None if neither."""
        return self._find_reported_failure() or self._find_dead_rank()

    def _other_ranks(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    def _find_reported_failure(self) -> Failure | None:
        for rank in self._other_ranks():
            if self.store.check([f"failed/{rank}"]):
                return Failure(*json.loads(self.store.get(f"failed/{rank}")))
        return None

    def _find_dead_rank(self) -> Failure | None:
        """Return the failure of a process of this host that does not exist any more."""
        for rank in self._other_ranks():
            host, process = json.loads(self.store.get(f"process/{rank}"))
            if host == host_identity() and not is_running(process):
                found = Failure(rank, "at an unknown place", "lost: its process has ended, or was killed")
                # For processes of other hosts, which cannot see that.
                self.store.set(f"failed/{rank}", json.dumps([found.rank, found.where, found.what]))
                return found
        return None


def is_broken_collective(error: BaseException) -> bool:
    """Say whether an error is what a collective raises when a peer is gone."""
    is_torchs = isinstance(error, RuntimeError) and not isinstance(error, PtaccError)
    return is_torchs and any(word in str(error).lower() for word in BROKEN)


@functools.cache
def host_identity() -> str:
    """Return what processes have in common that see each other's numbers: a name alone can be given twice."""
    try:
        boot, space = (
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            Path("/proc/self/ns/pid").stat().st_ino,
        )
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}/{boot}/{space}"


def is_running(process: int) -> bool:
    """Say whether a process of this host runs; one that ended and that nobody waited for does not."""
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:  # no such folder on this system: the signal has answered
        return not Path("/proc/self").exists()
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return state not in "ZX"


def open_connections() -> frozenset[tuple[int, int]]:
    """Return this process's connections, by file descriptor and inode, but for those to the rendezvous store."""
    store_port = int(os.environ.get("MASTER_PORT") or 0)
    found: set[tuple[int, int]] = set()
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    for entry in list(folder.iterdir()):
        with contextlib.suppress(OSError):
            descriptor = int(entry.name)
            status = os.fstat(descriptor)
            if stat.S_ISSOCK(status.st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    is_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if is_internet and store_port not in (connection.getsockname()[1], connection.getpeername()[1]):
                        found.add((descriptor, status.st_ino))
    return frozenset(found)

"""The other processes of a run, and what is told them on the host: never by way of the devices' own collectives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from typing_extensions import TypeVar

from ptacc.distributed.failure import Failure, FailureBoard, open_connections
from ptacc.distributed.rendezvous import Meetings
from ptacc.distributed.shutdown import rest_before_exit
from ptacc.errors import CollectiveError, LaunchError, PeerError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Peers:
    """The processes of a run. With one process, everything here is the identity and costs nothing.

    Args:
        rank: Index of this process.
        world_size: Number of processes.
        replica_size: Number of processes, of neighbouring ranks, that share one replica of the model: they take the
            same batches and draw alike, and what they take counts once.
        group: A gloo group of them all; None where there is one process.
        board: Where they tell each other of failures; None where there is one process.
        meetings: Where they meet for what all of them call; None where there is one process.
    """

    rank: int = 0
    world_size: int = 1
    replica_size: int = 1
    group: dist.ProcessGroup | None = None
    board: FailureBoard | None = None
    meetings: Meetings | None = None

    @classmethod
    def of_this_launch(cls, connected_before: frozenset[tuple[int, int]] = frozenset()) -> Peers:
        """Return the processes of the initialised process group. A collective: every process makes the same call.

        Args:
            connected_before: The connections that this process had before it joined the launch.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        rest_before_exit()
        board = FailureBoard(group, open_connections() - connected_before)
        return cls(dist.get_rank(), dist.get_world_size(), group=group, board=board, meetings=Meetings(board))

    def in_replicas_of(self, size: int) -> Peers:
        """Return the same processes, of which each `size` share a replica of the model.

        Raises:
            LaunchError: Their number cannot be divided so.
        """
        if self.is_alone:
            return self
        if self.world_size % size:
            raise LaunchError(
                f"{size} processes are to share each replica of the model, and {self.world_size} were launched, which "
                f"is no multiple of it. Launch {size * math.ceil(self.world_size / size)}, or have fewer share one."
            )
        return replace(self, replica_size=size)

    def check(self) -> None:
        """Raise `PeerError` if a process of this launch failed earlier."""
        if self.board is not None:
            self.board.check()

    def find_failure(self) -> Failure | None:
        """Return what became of another process: it told that it failed, or is gone. No collective."""
        return None if self.board is None else self.board.find_failure()

    def failing_together(self, where: str | Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        """Let an exception of the block end all processes, the others by a `PeerError` that names it.

        Args:
            where: Where this process is, for the others to be told.
        """
        return contextlib.nullcontext() if self.board is None else self.board.failing_together(where)

    def mark(self) -> None:
        """Mark a place that all processes pass alike before they wait for each other, for one that waits elsewhere."""
        if self.meetings is not None:
            self.meetings.trail.mark()

    def meet(self, call: str, ranks: Sequence[int] | None = None) -> None:
        """Wait until every process makes this call.

        Args:
            call: What the users called, for those who made another call to be told.
            ranks: The processes that meet, all of them if not given.

        Raises:
            CollectiveError: A process made another call, or went past the place without one.
            PeerError: A process was lost, or brings an error.
        """
        if self.meetings is not None:
            self.meetings.meet(call, ranks)

    @contextlib.contextmanager
    def meeting(self, call: str, ranks: Sequence[int] | None = None) -> Iterator[list[str]]:
        """Meet after a block without collectives: an error on one process is raised on all, which can go on.

        Args:
            call: What the users called.
            ranks: The processes that meet, all of them if not given.

        Yields:
            A list for the block to tell what has to be the same on all processes: data, options.

        Raises:
            PeerError: The block raised on another process.
            CollectiveError: Another process made another call, or told something else.
        """
        told: list[str] = []
        try:
            yield told
        except BaseException as error:
            if self.meetings is not None:
                with contextlib.suppress(PeerError, CollectiveError):  # each raises its own
                    self.meetings.meet(call, ranks, error=f"{type(error).__name__}: {error}")
            raise
        self.meet(f"{call} with {', '.join(told)}" if told else call, ranks)

    @contextlib.contextmanager
    def main_first(self, *, local: bool) -> Iterator[None]:
        """Let rank 0 go through the block first, or the first process of each host, and the others after it."""
        call = f"main_process_first({'local=True' if local else ''})"
        if self.meetings is None or self.meetings.inside == call:  # all that is in such a block has its order
            yield
            return
        if self.meetings.inside:
            raise CollectiveError(f"{call} within {self.meetings.inside}: put one after the other.")
        ranks = self.meetings.ranks_of_this_host() if local else range(self.world_size)
        if self.rank == ranks[0]:
            with self.meeting(call, ranks), self.meetings.within(call):
                yield
        else:
            self.meet(call, ranks)
            with self.failing_together(f"in {call}"), self.meetings.within(call):
                yield

    @property
    def is_alone(self) -> bool:
        """Whether there is one process only."""
        return self.world_size == 1

    @property
    def replica(self) -> int:
        """Index of this process's replica of the model."""
        return self.rank // self.replica_size

    @property
    def replicas(self) -> int:
        """Number of replicas, each of which takes batches of its own."""
        return self.world_size // self.replica_size

    @property
    def leader(self) -> int:
        """Rank of the process of this one's replica whose batches count."""
        return self.replica * self.replica_size

    @property
    def leads_replica(self) -> bool:
        """Whether this process is the one of its replica whose batches count."""
        return self.rank == self.leader

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all processes, in float64."""
        if self.is_alone:
            return list(values)
        self.mark()
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return cast(list[float], total.tolist())

    def maximum(self, value: int) -> int:
        """Return the largest value over all processes."""
        if self.is_alone:
            return value
        self.mark()
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the value that process `source` gave, on all of them."""
        if self.is_alone:
            return value
        self.mark()
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes in the order of their ranks, on all of them."""
        if self.is_alone:
            return [value]
        self.mark()
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return cast(list[T], values)

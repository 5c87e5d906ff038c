"""The ranks of a launch, and collectives on the host (gloo), independent of the device's own (NCCL)."""

from __future__ import annotations

import atexit
import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist

from ptacc.distributed.failure import Failure, FailureMonitor, find_peer_connections, open_connections
from ptacc.distributed.rendezvous import Rendezvous
from ptacc.distributed.shutdown import wait_until_gloo_is_idle
from ptacc.distributed.watchdog import start_watchdog
from ptacc.errors import CollectiveError, LaunchError, RankFailedError
from ptacc.types.aliases import T


@dataclass(frozen=True, slots=True)
class Distributed:
    """The ranks of a launch, and collectives on the host. With one process, each of them is the identity.

    Args:
        rank: Index of this process.
        world_size: Number of processes.
    """

    rank: int = 0
    world_size: int = 1
    _replica_size: int = 1
    _group: dist.ProcessGroup | None = None
    _rendezvous: Rendezvous | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def replica(self) -> int:
        """Index of this rank's replica of the model. Ranks that share a replica take the same batches."""
        return self.rank // self._replica_size

    @property
    def replicas(self) -> int:
        """Number of replicas of the model: `world_size`, unless tensor parallelism splits a model over ranks."""
        return self.world_size // self._replica_size

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sums over all ranks, in float64, on every rank."""
        if self.world_size == 1:
            return list(values)
        self._count_progress()
        total = torch.tensor(values, dtype=torch.float64, device="cpu")
        dist.all_reduce(total, group=self._group)
        return cast(list[float], total.tolist())

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the value of rank `source` on every rank."""
        if self.world_size == 1:
            return value
        self._count_progress()
        box = [value]
        dist.broadcast_object_list(box, src=source, group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        self._count_progress()
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return cast(list[T], values)

    def _count_progress(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.progress.increment()


@dataclass(frozen=True, slots=True)
class DistributedRuntime(Distributed):
    """`Distributed` with the internals of a trainer: failures of ranks, and points that all ranks must reach."""

    _failures: FailureMonitor | None = None

    @classmethod
    def from_process_group(cls, other_connections: frozenset[tuple[int, int]] | None) -> DistributedRuntime:
        """Return the ranks of the initialised process group. A collective.

        Args:
            other_connections: TCP connections that this process had before the group was initialised; None if unknown.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        atexit.unregister(wait_until_gloo_is_idle)  # it waits once, however many groups there were
        atexit.register(wait_until_gloo_is_idle)
        # Behind a NAT, connections to ranks are not recognised by their addresses, but by the time of their creation.
        connections = find_peer_connections(group)
        if other_connections is not None:
            connections = open_connections() - other_connections
        failures = FailureMonitor(group, connections)
        start_watchdog(failures)
        return cls(dist.get_rank(), dist.get_world_size(), 1, group, Rendezvous(failures), failures)

    def with_replica_size(self, size: int) -> DistributedRuntime:
        """Return the same ranks, of which each `size` consecutive ones share a replica of the model.

        Raises:
            LaunchError: The world size is not a multiple of `size`.
        """
        if self.is_single_process:
            return self
        if self.world_size % size:
            raise LaunchError(
                f"{size} processes have to share each replica of the model, but {self.world_size} were launched, which "
                f"is not a multiple of it. Launch {size * math.ceil(self.world_size / size)}, or share it among fewer."
            )
        return replace(self, _replica_size=size)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The gloo group of all ranks; None with one process."""
        return self._group

    @property
    def rendezvous(self) -> Rendezvous | None:
        """The points that all ranks must reach; None with one process."""
        return self._rendezvous

    @property
    def is_single_process(self) -> bool:
        """Whether `world_size` is 1."""
        return self.world_size == 1

    @property
    def replica_size(self) -> int:
        """Number of ranks that share one replica of the model."""
        return self._replica_size

    @property
    def leader(self) -> int:
        """The first rank of this replica. Its batches count for the replica."""
        return self.replica * self._replica_size

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank is the first of its replica."""
        return self.rank % self._replica_size == 0

    def find_failure(self) -> Failure | None:
        """Return the failure of another rank: one that it reported, or that its process has ended. Not a collective."""
        return None if self._failures is None else self._failures.find_failure()

    def propagate_failure(self, where: str | Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        """Report an exception of the block to all ranks, which raise `RankFailedError` with it and with `where`."""
        return contextlib.nullcontext() if self._failures is None else self._failures.propagate_failure(where)

    def count_progress(self) -> None:
        """Count a point that every rank passes. A rank that waits elsewhere detects ranks that have passed it."""
        if self._rendezvous is not None:
            self._rendezvous.progress.increment()

    def sync(self, call: str, ranks: Sequence[int] | None = None) -> None:
        """Wait until all of `ranks` make the same call: see `Rendezvous.sync`."""
        if self._rendezvous is not None:
            self._rendezvous.sync(call, ranks)

    @contextlib.contextmanager
    def synced(self, call: str, ranks: Sequence[int] | None = None) -> Generator[list[str]]:
        """Synchronise after a block without collectives. An error on one rank is raised on all, which can continue.

        Args:
            call: The call, as users write it.
            ranks: The ranks that make the call; all by default.

        Yields:
            A list to which the block appends what must be equal on all ranks, as text: data, options.

        Raises:
            RankFailedError: The block raised on another rank.
            CollectiveError: Another rank made another call, or appended something else.
        """
        must_match: list[str] = []
        try:
            yield must_match
        except BaseException as error:
            if self._rendezvous is not None:
                with contextlib.suppress(RankFailedError, CollectiveError):  # the error of this rank is raised here
                    self._rendezvous.sync(call, ranks, error=f"{type(error).__name__}: {error}")
            raise
        self.sync(f"{call} with {', '.join(must_match)}" if must_match else call, ranks)

    @contextlib.contextmanager
    def main_first(self, *, local: bool) -> Generator[None]:
        """Run the block on rank 0 first, or on the first rank of each host, and then on the others."""
        rendezvous = self._rendezvous
        call = f"main_process_first({'local=True' if local else ''})"
        if rendezvous is None or rendezvous.current_call == call:  # the outer block has set the order
            yield
            return
        if rendezvous.current_call:
            raise CollectiveError(f"{call} within {rendezvous.current_call}: put one after the other.")
        ranks = rendezvous.local_ranks() if local else range(self.world_size)
        is_first = self.rank == ranks[0]
        if not is_first:
            self.sync(call, ranks)
        with self.synced(call, ranks) if is_first else self.propagate_failure(f"in {call}"):
            rendezvous.current_call = call
            try:
                yield
            finally:
                rendezvous.current_call = ""

    def maximum(self, value: int) -> int:
        """Return the largest value over all ranks, on every rank."""
        if self.is_single_process:
            return value
        self._count_progress()
        largest = torch.tensor(value, device="cpu")
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return int(largest)

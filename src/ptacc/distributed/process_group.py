"""The ranks of a launch, and collectives on the host (gloo), independent of the device's own (NCCL)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from typing_extensions import TypeVar

from ptacc.distributed.failure import Failure, FailureMonitor, open_connections
from ptacc.distributed.rendezvous import Rendezvous
from ptacc.distributed.shutdown import wait_for_gloo_at_exit
from ptacc.errors import CollectiveError, LaunchError, RankFailedError

T = TypeVar("T")


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
        total = torch.tensor(values, dtype=torch.float64)
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
    """`Distributed`, with what the trainer itself needs: failures of ranks, and points that all ranks have to reach."""

    _failures: FailureMonitor | None = None

    @classmethod
    def from_process_group(cls, connected_before: frozenset[tuple[int, int]] = frozenset()) -> DistributedRuntime:
        """Return the ranks of the initialised process group. A collective.

        Args:
            connected_before: The connections that this process had before it joined the launch.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))
        wait_for_gloo_at_exit()
        failures = FailureMonitor(group, open_connections() - connected_before)
        return cls(dist.get_rank(), dist.get_world_size(), 1, group, Rendezvous(failures), failures)

    def with_replica_size(self, size: int) -> DistributedRuntime:
        """Return the same ranks, where each `size` neighbours share a replica of the model.

        Raises:
            LaunchError: The world size is not a multiple of `size`.
        """
        if self.is_single_process:
            return self
        if self.world_size % size:
            raise LaunchError(
                f"{size} processes have to share each replica of the model, but {self.world_size} were launched, which "
                f"is not a multiple of it. Launch {size * math.ceil(self.world_size / size)}, or let fewer share one."
            )
        return replace(self, _replica_size=size)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The gloo group of all ranks; None with one process."""
        return self._group

    @property
    def rendezvous(self) -> Rendezvous | None:
        """Where ranks wait for each other; None with one process."""
        return self._rendezvous

    @property
    def is_single_process(self) -> bool:
        """Whether there is one process only."""
        return self.world_size == 1

    @property
    def replica_size(self) -> int:
        """Number of ranks that share one replica of the model."""
        return self._replica_size

    @property
    def leader(self) -> int:
        """The rank of this replica whose batches count."""
        return self.replica * self._replica_size

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank is the one of its replica whose batches count."""
        return self.rank == self.leader

    def check(self) -> None:
        """Raise `RankFailedError` if another rank failed earlier."""
        if self._failures is not None:
            self._failures.check()

    def find_failure(self) -> Failure | None:
        """Return the failure of another rank: it reported one, or its process is gone. Not a collective."""
        return None if self._failures is None else self._failures.find_failure()

    def propagate_failure(self, where: str | Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        """Report an exception of the block to all ranks, which then raise `RankFailedError` with its text.

        Args:
            where: What this rank is doing, for the message.
        """
        return contextlib.nullcontext() if self._failures is None else self._failures.propagate_failure(where)

    def count_progress(self) -> None:
        """Count a place that all ranks pass before they wait for each other. It shows a rank that waits elsewhere."""
        self._count_progress()

    def sync(self, call: str, ranks: Sequence[int] | None = None) -> None:
        """Wait until every rank makes this call.

        Args:
            call: The call, as users write it. Ranks that made another call show it in their error.
            ranks: The ranks that have to make it; all if not given.

        Raises:
            CollectiveError: A rank made another call, or passed the place without one.
            RankFailedError: A rank was lost, or reports an error.
        """
        if self._rendezvous is not None:
            self._rendezvous.sync(call, ranks)

    @contextlib.contextmanager
    def synced(self, call: str, ranks: Sequence[int] | None = None) -> Iterator[list[str]]:
        """Synchronise after a block without collectives. An error on one rank is raised on all, which can continue.

        Args:
            call: The call, as users write it.
            ranks: The ranks that have to make it; all if not given.

        Yields:
            A list to which the block appends what has to be the same on all ranks: data, options.

        Raises:
            RankFailedError: The block raised on another rank.
            CollectiveError: Another rank made another call, or appended something else.
        """
        must_match: list[str] = []
        try:
            yield must_match
        except BaseException as error:
            if self._rendezvous is not None:
                with contextlib.suppress(RankFailedError, CollectiveError):  # each raises its own
                    self._rendezvous.sync(call, ranks, error=f"{type(error).__name__}: {error}")
            raise
        self.sync(f"{call} with {', '.join(must_match)}" if must_match else call, ranks)

    @contextlib.contextmanager
    def main_first(self, *, local: bool) -> Iterator[None]:
        """Run the block on rank 0 first, or on the first rank of each host, and then on the others."""
        call = f"main_process_first({'local=True' if local else ''})"
        if self._rendezvous is None or self._rendezvous.inside == call:  # a nested block is in order already
            yield
            return
        if self._rendezvous.inside:
            raise CollectiveError(f"{call} within {self._rendezvous.inside}: put one after the other.")
        ranks = self._rendezvous.local_ranks() if local else range(self.world_size)
        if self.rank == ranks[0]:
            with self.synced(call, ranks), self._rendezvous._marking_call(call):
                yield
        else:
            self.sync(call, ranks)
            with self.propagate_failure(f"in {call}"), self._rendezvous._marking_call(call):
                yield

    def maximum(self, value: int) -> int:
        """Return the largest value over all ranks, on every rank."""
        if self.is_single_process:
            return value
        self._count_progress()
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._group)
        return int(largest)

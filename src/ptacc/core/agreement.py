"""Agreement: all processes stop at the same step, for the same named reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ptacc.core.peers import Peers


@dataclass(frozen=True, slots=True)
class Stop:
    """A wish to stop, or the decision to.

    Args:
        reason: Why, for people to read.
        exit_code: What the process exits with after the run, where it was asked to terminate.
    """

    reason: str
    exit_code: int | None = None


class StopVote:
    """The processes' wishes to stop, exchanged every `agree_every` steps by a collective that runs beside the step.

    A vote that is cast at one step is counted at the next, so that nobody waits for it. Which steps these are is a
    function of the number of the step, the same on every process.
    """

    def __init__(self, peers: Peers, agree_every: int) -> None:
        """Vote among `peers`."""
        self._peers, self._agree_every = peers, agree_every
        self._ballot: tuple[torch.Tensor, dist.Work, Stop | None] | None = None

    def outcome(self, step: int, wish: Stop | None) -> Stop | None:
        """Return what all processes agree to stop for after `step`, None to go on.

        Args:
            step: Steps completed.
            wish: Why this process wants to stop, None if it does not.
        """
        if self._peers.is_alone:
            return wish
        decision = self._count()
        if decision is None and step % self._agree_every == 0:
            self._cast(wish)
        return decision

    def at_boundary(self, wish: Stop | None) -> Stop | None:
        """Vote and count at once, where all processes are at the same place anyway: the end of an epoch."""
        if self._peers.is_alone:
            return wish
        self._count()  # a wish outlives the vote it was cast in
        self._cast(wish)
        return self._count()

    def _cast(self, wish: Stop | None) -> None:
        # The largest number wins: the lowest rank that was asked to terminate, else the lowest that wishes to stop.
        urgency = 0 if wish is None else 1 if wish.exit_code is None else 2
        number = torch.tensor(urgency * self._peers.world_size - self._peers.rank if urgency else 0)
        work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._peers.group, async_op=True)
        assert work is not None
        self._ballot = (number, work, wish)

    def _count(self) -> Stop | None:
        if self._ballot is None:
            return None
        number, work, wish = self._ballot
        self._ballot = None
        self._peers.mark()
        work.wait()
        if not int(number):
            return None
        source = -int(number) % self._peers.world_size
        return self._peers.broadcast(wish, source=source)

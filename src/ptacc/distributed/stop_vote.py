"""Agreement: all processes stop at the same step, for the same named reason."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist

from ptacc.distributed.process_group import DistributedRuntime


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A wish to stop, or the decision to.

    Args:
        reason: Why, for people to read.
        exit_code: What the process exits with after the run, where it was asked to terminate.
    """

    reason: str
    exit_code: int | None = None


COST = 0.007
"""What votes may cost, as a part of the time of the steps."""
BESIDE_A_STEP = 4.0
"""How much more a vote beside a step costs than one by itself, for it wakes threads that share cores with the step's.

Measured by `benchmarks/agreement.py`, with a vote in each step.
"""
MOST_STEPS = 256
FIRST_STEPS = 24
"""Steps after which it is known how long one takes; half of them are to get warm. There is a vote in each of them."""


def steps_between_votes(step_seconds: float, vote_seconds: float) -> int:
    """Return how often to vote, so that it costs less than a hundredth of the steps.

    Args:
        step_seconds: What a step takes.
        vote_seconds: What a vote takes by itself.

    Example:
        >>> steps_between_votes(step_seconds=0.3, vote_seconds=2e-4), steps_between_votes(0.002, 2e-4)
        (1, 58)
    """
    return min(max(math.ceil(BESIDE_A_STEP * vote_seconds / (COST * step_seconds)), 1), MOST_STEPS)


@dataclass
class Pace:
    """How long steps take, until so many are through that it is known how often to vote."""

    ends: list[float] = field(default_factory=list)

    def is_known(self) -> bool:
        """Take in that a step ended, and say whether that was the last to look at."""
        self.ends.append(time.monotonic())
        return len(self.ends) == FIRST_STEPS

    def steps_between_votes(self, distributed: DistributedRuntime) -> int:
        """Return how often to vote. A collective: every process asks at the same step, and hears the same."""
        warm = self.ends[FIRST_STEPS // 2 :]
        votes: list[float] = []
        for _ in range(5):
            started = time.monotonic()
            distributed.maximum(0)
            votes.append(time.monotonic() - started)
        vote_seconds = statistics.median(votes)
        with_votes = statistics.median(end - start for start, end in pairwise(warm))
        step_seconds = max(with_votes - BESIDE_A_STEP * vote_seconds, 1e-6)
        return distributed.maximum(steps_between_votes(step_seconds, vote_seconds))


class StopConsensus:
    """The processes' wishes to stop, exchanged every few steps by a collective that runs beside the step.

    A vote that is cast at one step is counted at the next, so that nobody waits for it. Which steps these are is a
    function of the number of the step, the same on every process.

    Attributes:
        stop_check_every: Steps between two votes.
    """

    def __init__(self, distributed: DistributedRuntime, stop_check_every: int | None = None) -> None:
        """Vote among `_distributed`.

        Args:
            distributed: The processes.
            stop_check_every: Steps between two votes; if not given, as many as keep their cost small, and 1 until it is
                known how many that is: the first steps may take minutes.
        """
        self._peers, self.stop_check_every = distributed, stop_check_every or 1
        self._pace = Pace() if stop_check_every is None and not distributed.is_single_process else None
        self._ballot: tuple[torch.Tensor, dist.Work, StopRequest | None] | None = None

    def state_dict(self) -> dict[str, int | None]:
        """Return how often to vote, None where that is not known yet."""
        return {"stop_check_every": None if self._pace is not None else self.stop_check_every}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        """Vote as often as before, unless it was said how often."""
        if self._pace is not None and (known := state_dict["stop_check_every"]) is not None:
            self.stop_check_every, self._pace = known, None

    def poll(self, step: int, wish: StopRequest | None) -> StopRequest | None:
        """Return what all processes agree to stop for after `step`, None to go on.

        Args:
            step: Steps completed.
            wish: Why this process wants to stop, None if it does not.
        """
        if self._peers.is_single_process:
            return wish
        decision = self._receive()
        if self._pace is not None and self._pace.is_known():
            self.stop_check_every, self._pace = self._pace.steps_between_votes(self._peers), None
        if decision is None and step % self.stop_check_every == 0:
            self._send(wish)
        return decision

    def at_boundary(self, wish: StopRequest | None) -> StopRequest | None:
        """Vote and count at once, where all processes are at the same place anyway: the end of an epoch."""
        if self._peers.is_single_process:
            return wish
        self._receive()  # a wish outlives the vote it was cast in
        self._send(wish)
        return self._receive()

    def _send(self, wish: StopRequest | None) -> None:
        # The largest number wins: the lowest rank that was asked to terminate, else the lowest that wishes to stop.
        urgency = 0 if wish is None else 1 if wish.exit_code is None else 2
        number = torch.tensor(urgency * self._peers.world_size - self._peers.rank if urgency else 0)
        work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._peers.group, async_op=True)
        assert work is not None
        self._ballot = (number, work, wish)

    def _receive(self) -> StopRequest | None:
        if self._ballot is None:
            return None
        number, work, wish = self._ballot
        self._ballot = None
        self._peers.count_progress()
        work.wait()
        if not int(number):
            return None
        source = -int(number) % self._peers.world_size
        return self._peers.broadcast(wish, source=source)

"""Votes by which all ranks stop a run after the same step, for the same reason.

A rank that stopped by itself would leave the others waiting in their next collective. A vote is an all-reduce of the
ranks' requests to stop, on the host (gloo). It is started after one step and read after the next, so that it overlaps
that step and no rank waits for it. All ranks read the same result after the same step.

There are two kinds of requests:

- A request that follows from the training itself (early stopping, a NaN loss, `trainer.stop()`) takes part in the
  votes at multiples of `check_every` steps only. A request made in step `s` stops the run after step `n + 1`, where
  `n` is the first multiple of `check_every` from `s` on. The speed of the steps has no influence.
- A request that depends on the clock (a signal, `max_time`) takes part in every vote. Where steps are long there are
  more votes than those at multiples of `check_every`, so that a signal is answered within about `CLOCK_VOTE_SECONDS`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist

from ptacc.distributed.process_group import DistributedRuntime

CLOCK_VOTE_SECONDS: Final = 0.5
"""Time between two votes where `check_every` steps take longer than that; at least one step."""


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A request to stop a run, and the decision that results from a vote.

    Args:
        reason: The reason, as reported in `history.stop_reason`.
        step: Number of completed steps when it was made.
        exit_code: For a signal, the exit code of the process.
        depends_on_clock: Whether the request depends on the clock, and not on the training alone.
        is_lasting: Whether a run that was stopped by it stays stopped when it is resumed. The cause of any other
            request is evaluated again.
    """

    reason: str
    step: int = 0
    exit_code: int | None = None
    depends_on_clock: bool = False
    is_lasting: bool = False

    @property
    def priority(self) -> int:
        """The largest priority of a vote wins, and then the lowest rank: signals, `max_time`, all others."""
        return 1 + self.depends_on_clock + (self.exit_code is not None)


class StopConsensus:
    """The votes of one run. With one process, each request is its own decision.

    Args:
        distributed: The ranks.
        check_every: Steps between two votes in which every request takes part.
    """

    def __init__(self, distributed: DistributedRuntime, check_every: int) -> None:
        self._distributed = distributed
        self._check_every = check_every
        self._pending: tuple[torch.Tensor, dist.Work, StopRequest | None] | None = None
        self._polls_per_vote = 1  # the first steps may take minutes, in which a model is compiled
        self._polls = 0
        self._voted_at = time.monotonic()

    def poll(self, request: StopRequest | None, step: int | None = None) -> StopRequest | None:
        """Return the decision of the last vote, and start the next vote if it is due.

        Args:
            request: This rank's request.
            step: Number of completed steps; None within an evaluation, where votes are paced by the clock alone.

        Returns:
            The request for which all ranks stop now; None to continue.
        """
        if self._distributed.is_single_process:
            return request
        decision = self._receive()
        self._polls += 1
        takes_all = step is not None and step % self._check_every == 0
        if decision is None and (takes_all or self._polls >= self._polls_per_vote):
            takes_part = request is not None and (takes_all or request.depends_on_clock)
            self._send(request if takes_part else None)
        return decision

    def agree_now(self, request: StopRequest | None) -> StopRequest | None:
        """Vote and wait for the decision. A vote that was started by `poll` stays pending."""
        if self._distributed.is_single_process:
            return request
        return self._decide(self._distributed.maximum(self._encode(request)), request)

    def repeat_vote(self, request: StopRequest | None, step: int) -> StopRequest | None:
        """Return the decision that a resumed run would have read after `step`, had no signal ended it there."""
        took_part = request is not None and request.step < step and (step - 1) % self._check_every == 0
        return self.agree_now(request if took_part else None)

    def _send(self, request: StopRequest | None) -> None:
        now = time.monotonic()
        microseconds = int(1e6 * (now - self._voted_at) / self._polls)
        self._polls, self._voted_at = 0, now
        values = torch.tensor([self._encode(request), microseconds], device="cpu")
        work = dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._distributed.group, async_op=True)
        assert work is not None
        self._pending = (values, work, request)

    def _receive(self) -> StopRequest | None:
        if self._pending is None:
            return None
        (values, work, request), self._pending = self._pending, None
        self._distributed.count_progress()
        work.wait()
        largest, microseconds = values.tolist()  # of the slowest rank, so that all ranks choose the same pace
        self._polls_per_vote = min(int(1e6 * CLOCK_VOTE_SECONDS / max(microseconds, 1)), self._check_every)
        return self._decide(largest, request)

    def _encode(self, request: StopRequest | None) -> int:
        return 0 if request is None else request.priority * self._distributed.world_size - self._distributed.rank

    def _decide(self, largest: int, request: StopRequest | None) -> StopRequest | None:
        return self._distributed.broadcast(request, source=-largest % self._distributed.world_size) if largest else None

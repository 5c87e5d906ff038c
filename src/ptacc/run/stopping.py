"""Stopping a run before its end: the requests of this rank, and what the ranks decided."""

from __future__ import annotations

from dataclasses import asdict

from ptacc.distributed.process_group import DistributedRuntime
from ptacc.distributed.stop_vote import StopConsensus, StopRequest
from ptacc.run.history import RunHistory
from ptacc.types.arguments import DEFAULT_STOP_CHECK_EVERY, RunOptions, max_seconds
from ptacc.types.progress import Progress
from ptacc.types.protocols import StateDict


class StopState:
    """Requests to stop a run, and what the ranks decided.

    Args:
        distributed: The ranks, which all stop after the same step.
        history: The history of the run, which reports why it stopped.
        options: Arguments of `train()`. `max_time` stops the run, too.

    Attributes:
        decision: The request for which the run stops; None while it continues.
        consensus: Votes of the ranks.
    """

    def __init__(self, distributed: DistributedRuntime, history: RunHistory, options: RunOptions) -> None:
        self.decision: StopRequest | None = None
        self._rank, self._history = distributed.rank, history
        check_every = options.get("stop_check_every", DEFAULT_STOP_CHECK_EVERY)
        self.consensus: StopConsensus = StopConsensus(distributed, check_every)
        self._max_seconds = max_seconds(options)
        self._time_limit = StopRequest(f"max_time={options['max_time']} reached", depends_on_clock=True)
        self._request: StopRequest | None = None
        self._termination: StopRequest | None = None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process, if a signal ended the run."""
        return None if self.decision is None else self.decision.exit_code

    @property
    def is_lasting(self) -> bool:
        """Whether `trainer.stop()` has stopped the run, so that it stays stopped when it is resumed."""
        return self.decision is not None and self.decision.is_lasting

    @property
    def is_early(self) -> bool:
        """Whether the run stops before it has reached its plan or `max_time`."""
        return self.decision is not None and self.decision.reason != self._time_limit.reason

    def request(self, reason: str, progress: Progress, *, is_lasting: bool = False) -> None:
        """Request the end of the run. The first reason is kept.

        Args:
            reason: The reason, as reported in `history.stop_reason`.
            progress: Progress of the run.
            is_lasting: Whether the run stays stopped when it is resumed.
        """
        self._request = self._request or StopRequest(reason, progress.steps, is_lasting=is_lasting)

    def request_termination(self, signal: str, exit_code: int) -> None:
        """Request the end of the run and of the process, because this rank received a signal."""
        request = StopRequest(f"{signal} on rank {self._rank}", exit_code=exit_code, depends_on_clock=True)
        self._termination = self._termination or request

    def poll(self, progress: Progress, reason: str | None) -> None:
        """Vote with all ranks between two steps. The decision follows one step later.

        Args:
            progress: Progress of the run.
            reason: Why the trainer requests a stop now; None if it does not. Earlier requests count as well.
        """
        self._accept(self.consensus.poll(self._any_request(progress, reason), progress.steps))

    def agree(self, progress: Progress, reason: str | None) -> None:
        """Vote with all ranks as `poll` does, and wait for the decision."""
        self._accept(self.consensus.agree_now(self._any_request(progress, reason)))

    def agree_on_clock(self, progress: Progress) -> None:
        """Vote with all ranks on signals and `max_time` alone, and wait for the decision."""
        self._accept(self.consensus.agree_now(self._clock_request(progress)))

    def poll_termination(self) -> bool:
        """Vote with all ranks on signals alone, within an evaluation. Return whether all ranks leave it now.

        Other requests wait for the end of the evaluation, which may be the last one of the run.
        """
        self._accept(self.consensus.poll(self._termination))
        return self.exit_code is not None

    def apply_pending_signal(self) -> None:
        """Apply a signal that arrived after the last vote, to this process alone."""
        self._accept(self._termination)

    def state_dict(self) -> StateDict | None:
        """Return the decision, which all ranks share. That of a signal ends the process, and not the run."""
        return None if self.decision is None or self.exit_code else asdict(self.decision)

    def request_state_dict(self) -> StateDict | None:
        """Return the request of this rank on which the ranks have not decided yet."""
        return None if self._request is None or self.state_dict() else asdict(self._request)

    def restore(self, decision: StateDict | None, request: StateDict | None, step: int) -> None:
        """Restore the state of a run that was saved after `step`. A collective."""
        if request is not None:
            self._request = StopRequest(**request)
        if decision is not None and decision["is_lasting"]:
            self._accept(StopRequest(**decision))
        self._accept(self.consensus.repeat_vote(self._request, step))

    def _any_request(self, progress: Progress, reason: str | None) -> StopRequest | None:
        if reason is not None:
            self.request(reason, progress)
        return self._clock_request(progress) or self._request

    def _clock_request(self, progress: Progress) -> StopRequest | None:
        is_time_up = self._max_seconds is not None and progress.seconds >= self._max_seconds
        return self._termination or (self._time_limit if is_time_up else None)

    def _accept(self, request: StopRequest | None) -> None:
        """Decide for the first request, or for the first one with an exit code."""
        if request is not None and (self.decision is None or (request.exit_code and not self.exit_code)):
            self.decision, self._history.stop_reason = request, request.reason

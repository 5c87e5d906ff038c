"""The state of one run: made when `train()` starts, kept until the next one, and in it nothing is Optional."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from ptacc.data.batch import BatchSource, HostBatch
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.distributed.stop_vote import StopConsensus, StopRequest
from ptacc.engines.base import Engine
from ptacc.errors import LossError, NoRunError
from ptacc.run.history import RunHistory, StepResult
from ptacc.run.state import EpochState, LossSum, ResumeState, StateKey
from ptacc.run.window import Window
from ptacc.types.aliases import T
from ptacc.types.arguments import RunOptions, max_seconds
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.progress import Cadence, Minutes, Progress, RunPlan
from ptacc.types.protocols import StateDict

MAX_SKIPPED_STEPS = 200
"""Steps in a row that a gradient scaler skips at most: halved as often, its factor would be 0."""


@dataclass
class Run:
    """One run of a trainer.

    Args:
        options: What `train()` was asked for.
        plan: How long the run will be.
        seed: From which the order of the data and all randomness in loading it are derived.
        engine: What turns losses into updates.
        device: The device of this process.
        distributed: The processes.
        data: The training batches of this process.
        eval_data: The batches of each evaluation set, by name.
        history: What the run reported.
        vote: How the processes agree to stop between steps.
        eval_vote: How they agree to within evaluations, whose batches may take longer, or less.
        accumulation_steps: Batches that a process takes for one step.
        values: The names and handles of the values that are reported.
        conditions: What has to be the same when the run goes on from a checkpoint, by name.
        saved: What the run goes on from, None where it begins.
        batch: What this process trains on at present, while all call the model alike; None between steps.
        partial_evaluation: What was evaluated in the evaluation of all sets that is under way, or was broken off.
        is_consistent: Whether all that belongs to a step is done, and nothing of the next: the run could be saved here.
        is_scheduled_evaluation: Whether the evaluation under way is the run's own, and not one that a hook asked for.
    """

    options: RunOptions
    plan: RunPlan
    seed: int
    engine: Engine
    device: torch.device
    distributed: DistributedRuntime
    data: BatchSource
    eval_data: Mapping[str, BatchSource]
    history: RunHistory
    vote: StopConsensus
    eval_vote: StopConsensus
    accumulation_steps: int
    values: frozenset[str]
    conditions: Mapping[str, str]
    saved: ResumeState | None = None
    epoch: EpochState = field(init=False)
    progress: Progress = field(default_factory=Progress)
    evaluated_at: Progress = field(default_factory=Progress)
    batch: HostBatch[Any] | None = None
    partial_evaluation: dict[str, EvalResult] = field(default_factory=dict)
    is_consistent: bool = False
    is_scheduled_evaluation: bool = False
    is_over: bool = False
    exit_code: int | None = None
    _skipped: int = 0
    _stop_request: StopRequest | None = None
    _termination: StopRequest | None = None
    _started: float = field(default_factory=time.monotonic)
    _states: dict[StateKey[Any], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.begin_epoch()
        if self.saved is None:
            self.history.begin(self.seed, self.plan)
        else:
            self._restore(self.saved)

    @property
    def model(self) -> nn.Module:
        """The model as steps call it."""
        return self.engine.model

    # ---- a mixin's part of the state

    def __getitem__(self, key: StateKey[T]) -> T:
        """Return the part of the state under `key`."""
        try:
            return cast(T, self._states[key])
        except KeyError:
            raise NoRunError(
                f"The run has no state {key.name!r} yet: it is made in on_run_start. Read it after that, in a class "
                "that composes the mixin it belongs to."
            ) from None

    def __setitem__(self, key: StateKey[T], state: T) -> None:
        """Put a part of the state under `key`."""
        self._states[key] = state

    def __contains__(self, key: object) -> bool:
        """Say whether there is a state under `key`."""
        return key in self._states

    def states(self) -> Iterator[tuple[StateKey[Any], Any]]:
        """Iterate over the parts of the state, each with its key."""
        yield from self._states.items()

    # ---- how far it is

    def begin_epoch(self) -> None:
        """Start to gather anew, unless the run goes on within an epoch."""
        if not self.is_within_epoch:
            self.epoch = EpochState(LossSum(self.device), self.data.num_batches())

    def count(self, window: Window[Any], step: StepResult, *, happened: bool) -> None:
        """Count the batches of a window that was gone through, and its step if that happened."""
        now, end = self.progress, window.batches[-1].end
        self.progress = Progress(
            steps=step.step if happened else now.steps,
            epochs=now.epochs,
            batches=now.batches + len(window.batches),
            offset=end,
            items=now.items + step.items if happened else now.items,
            seconds=time.monotonic() - self._started,
        )
        self._skipped = 0 if happened else self._skipped + 1
        if self._skipped == MAX_SKIPPED_STEPS:
            raise LossError(
                f"{MAX_SKIPPED_STEPS} steps in a row were skipped: the gradients are infinite or NaN at any scale. "
                "Look for the first such loss: StopOnNonFinite names its step."
            )
        if not happened:
            return
        self.epoch.learning_rate = step.learning_rate
        self.epoch.losses.add(step.loss, step.items)
        if self.history.is_full:  # before this step is added: hooks may log to it yet
            self.history.read_steps(self.distributed)
        self.history.add_step(step)

    def complete_epoch(self) -> None:
        """Count an epoch whose data was gone through."""
        self.progress = replace(self.progress, epochs=self.progress.epochs + 1, batches=0, offset=0)
        self.epoch.is_counted = True

    def uncount_epoch(self, within: Progress) -> None:
        """Be within the epoch again, at `within`, since what comes at its end was broken off."""
        self.progress, self.epoch.is_counted = within, False

    @property
    def is_within_epoch(self) -> bool:
        """Whether an epoch was begun that is not counted yet."""
        return self.progress.batches > 0

    @property
    def is_epoch_complete(self) -> bool:
        """Whether the epoch's data was gone through."""
        epoch = self.epoch
        return epoch.is_counted or epoch.is_exhausted or self.progress.batches == epoch.num_batches

    def epoch_record(self, number: int, metrics: Mapping[str, float]) -> EpochRecord:
        """Put the record of the epoch together. A collective: every process makes the same call."""
        losses = self.epoch.losses
        (total,) = self.distributed.sum([float(losses.total)])
        return EpochRecord(
            epoch=number,
            step=self.progress.steps,
            train_loss=total / self.distributed.world_size / losses.items if losses.items else float("nan"),
            items=losses.items,
            seconds=time.monotonic() - self.epoch.started,
            learning_rate=float(self.epoch.learning_rate),
            is_complete=self.epoch.is_counted,
            evaluations=dict(self.epoch.evaluations),
            logged=self.history.take_logged_means(),
            train_metrics=metrics,
        )

    # ---- how it is saved, and goes on

    def state_dict(self) -> StateDict:
        """Return what all processes have in common, as rank 0 has it; the history is read from the device by then."""
        epoch = self.epoch
        return {
            "seed": self.seed,
            "conditions": dict(self.conditions),
            "progress": asdict(self.progress),
            "evaluated_at": asdict(self.evaluated_at),
            "partial_evaluation": {name: asdict(result) for name, result in self.partial_evaluation.items()},
            "vote": self.vote.state_dict(),
            "eval_vote": self.eval_vote.state_dict(),
            "history": self.history.state_dict(),
            "epoch": {
                "num_batches": epoch.num_batches,
                "items": epoch.losses.items,
                "seconds": time.monotonic() - epoch.started,
                "learning_rate": epoch.learning_rate,
                "is_exhausted": epoch.is_exhausted,
                "evaluations": {name: asdict(result) for name, result in epoch.evaluations.items()},
            },
        }

    def own_state_dict(self) -> StateDict:
        """Return what is this process's own."""
        was_heeded = self.history.stop_reason is not None and self.exit_code is None
        return {
            "losses": self.epoch.losses.total,
            "stop_request": None if self._stop_request is None or was_heeded else self._stop_request.reason,
            "data": self.data.state_dict(),
        }

    def _restore(self, saved: ResumeState) -> None:
        """Be where a saved run was."""
        state, epoch = saved.shared, saved.shared["epoch"]
        self.progress, self.evaluated_at = saved.progress, Progress(**state["evaluated_at"])
        self.partial_evaluation = {name: EvalResult(**result) for name, result in state["partial_evaluation"].items()}
        self.vote.load_state_dict(state["vote"])
        self.eval_vote.load_state_dict(state["eval_vote"])
        self.history.load_state_dict(state["history"])
        self._started -= self.progress.seconds
        self.epoch.started -= epoch["seconds"]
        self.epoch.learning_rate, self.epoch.is_exhausted = epoch["learning_rate"], epoch["is_exhausted"]
        self.epoch.evaluations = {name: EvalResult(**result) for name, result in epoch["evaluations"].items()}
        self.epoch.losses.items = epoch["items"]
        self.epoch.losses.total.copy_(saved.own["losses"])
        if self.is_within_epoch:
            left = self.data.num_batches(self.progress.offset)
            self.epoch.num_batches = None if left is None else self.progress.batches + left
        if (reason := saved.own["stop_request"]) is not None:
            self.request_stop(reason)
        self.data.load_state_dict(saved.own["data"])

    def fresh_values(self) -> dict[str, float]:
        """Return the values that were reported of the present weights, by name."""
        values: dict[str, float] = {}
        if self.evaluated_at.steps == self.progress.steps:
            for name, result in self.epoch.evaluations.items():
                values |= result.values(name)
        if self.epoch.is_counted:
            values |= replace(self.history[-1], evaluations={}).values()
        return values

    # ---- when it ends

    def request_stop(self, reason: str, exit_code: int | None = None) -> None:
        """Ask for the end of the run after this step; all processes will agree on it.

        Args:
            reason: Why.
            exit_code: What to exit with, where the process was asked to terminate: that goes before other wishes.
        """
        if exit_code is None:
            self._stop_request = self._stop_request or StopRequest(reason)
        else:
            self._termination = self._termination or StopRequest(reason, exit_code)

    def request_termination(self, signal: str, exit_code: int) -> None:
        """Ask for the end of the run as a signal demands it."""
        self.request_stop(f"{signal} on rank {self.distributed.rank}", exit_code)

    def agree_to_stop(self, reason: str | None, *, at_boundary: bool = False) -> None:
        """Tell the other processes what this one wishes, and hear whether all stop.

        Args:
            reason: Why the trainer wants to stop, None if it does not; what was asked for earlier counts as well.
            at_boundary: Whether all processes are at the same place anyway, and can wait for the answer.
        """
        limit = max_seconds(self.options)
        if limit is not None and self.progress.seconds >= limit:
            self.request_stop(self._time_is_up)
        if reason is not None:
            self.request_stop(reason)
        if at_boundary:
            self._accept(self.vote.at_boundary(self._termination or self._stop_request))
        else:
            self._accept(self.vote.poll(self.progress.steps, self._termination or self._stop_request))

    def agree_to_terminate(self, batches: int) -> bool:
        """Say whether all processes leave an evaluation after so many batches, since one was asked to terminate.

        Other wishes wait for its end: an evaluation is due because, or although, the run is about to stop.
        """
        self._accept(self.eval_vote.poll(batches, self._termination))
        return self.exit_code is not None

    def _accept(self, decision: StopRequest | None) -> None:
        """Take a decision in: the first, or the first that demands an exit."""
        if decision is None or self.exit_code is not None:
            return
        if self.history.stop_reason is None or decision.exit_code is not None:
            self.history.stop_reason, self.exit_code = decision.reason, decision.exit_code

    def apply_pending_signal(self) -> None:
        """Let a request to terminate that came after the last agreement end this process, at least."""
        self._accept(self._termination)

    @property
    def _time_is_up(self) -> str:
        return f"max_time={self.options['max_time']} reached"

    @property
    def ends_as_planned(self) -> bool:
        """Whether nothing but its limits has ended the run."""
        return self.history.stop_reason in (None, self._time_is_up)

    @property
    def lacks_last_evaluation(self) -> bool:
        """Whether the run is at its end as planned, and the weights it ends with were not evaluated."""
        return self.is_done() and self.ends_as_planned and self.evaluated_at.steps < self.progress.steps

    def is_done(self) -> bool:
        """Say whether the run is at its end."""
        return self.history.stop_reason is not None or is_done(self.progress, self.plan)

    def is_due(self, cadence: Cadence, last: Progress) -> bool:
        """Say whether something is due; where the clock decides, rank 0's does for all."""
        due = cadence.is_due(self.progress, last)
        return self.distributed.broadcast(due) if isinstance(cadence, Minutes) else due


def is_done(progress: Progress, plan: RunPlan) -> bool:
    """Say whether a run of this plan is complete.

    Example:
        >>> is_done(Progress(steps=25), RunPlan.compute(num_epochs=3, steps_per_epoch=10, max_steps=25))
        True
    """
    if plan.known_total_steps is not None and progress.steps >= plan.known_total_steps:
        return True
    return plan.epoch_limit is not None and progress.epochs >= plan.epoch_limit

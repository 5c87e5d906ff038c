"""The state of one run: created when `train()` starts, and kept until the next call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn

from ptacc.data.batch import BatchSource, HostBatch
from ptacc.data.sampling import ENDLESS
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.distributed.stop_vote import StopConsensus, StopRequest
from ptacc.engines.base import Engine
from ptacc.errors import DataError, LossError, NoRunError
from ptacc.model.averaging import AveragedWeights
from ptacc.run.history import RunHistory, StepResult
from ptacc.run.state import EpochState, LossSum, ResumeState, StateKey
from ptacc.run.window import Window
from ptacc.types.aliases import T
from ptacc.types.arguments import RunOptions, max_seconds
from ptacc.types.monitor import ValueNames
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.progress import Cadence, Minutes, Progress, RunPlan
from ptacc.types.protocols import StateDict

MAX_SKIPPED_STEPS = 200
"""Consecutive steps that a gradient scaler may skip. Halved as often, its factor would be 0."""


@dataclass
class Run:
    """The state of one run of a trainer.

    Args:
        options: Arguments of `train()`.
        plan: Length of the run.
        seed: Seed of the data order, and of all randomness in loading the data.
        data: Training batches of this rank.
        eval_data: Batches of each evaluation set on this rank, by the name of the set.
        consensus: Votes of the ranks on stopping.
        accumulation_steps: Batches of a step on each rank.
        value_names: Names of the values that it may report.
        invariants: What must be the same when the run is resumed, by name.
        resume_state: The saved run that this run resumes; None for a new run.
        evaluated_at: Progress at the last evaluation of all sets.
        batch: Batch of the forward or backward pass in progress; None between steps.
        partial_evaluation: Results of the sets evaluated so far, in an evaluation that is in progress or interrupted.
        is_consistent: Whether the run is between two steps, with nothing of the next step done, and can be saved.
        is_scheduled_evaluation: Whether the evaluation in progress is the loop's own. False if a hook evaluates.
        has_checked_monitors: Whether an evaluation has reported all values of evaluations that are monitored.
        exit_code: Exit code of the process, if a signal ended the run.
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
    consensus: StopConsensus
    accumulation_steps: int
    value_names: ValueNames
    invariants: Mapping[str, str]
    resume_state: ResumeState | None = None
    epoch: EpochState = field(init=False)
    progress: Progress = field(default_factory=Progress)
    evaluated_at: Progress = field(default_factory=Progress)
    batch: HostBatch[Any] | None = None
    partial_evaluation: dict[str, EvalResult] = field(default_factory=dict)
    is_consistent: bool = False
    is_scheduled_evaluation: bool = False
    has_checked_monitors: bool = False
    is_over: bool = False
    exit_code: int | None = None
    _skipped_steps: int = 0
    _stopped_by: StopRequest | None = None
    _stop_request: StopRequest | None = None
    _termination: StopRequest | None = None
    _started: float = field(default_factory=time.monotonic)
    _states: dict[StateKey[Any], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._max_seconds = max_seconds(self.options)
        self.begin_epoch()
        if self.resume_state is not None:
            self._restore(self.resume_state)
        if self.resume_state is None or self.resume_state.shared["history"]["file"] is None:
            self.history.begin(self.seed, self.plan)

    @property
    def model(self) -> nn.Module:
        """The wrapped model, as training steps call it."""
        return self.engine.model

    # ---- states of mixins

    def __getitem__(self, key: StateKey[T]) -> T:
        try:
            return cast(T, self._states[key])
        except KeyError:
            raise NoRunError(
                f"The run has no state {key.name!r} yet: it is made in on_run_start. Read it after that, in a class "
                "that composes the mixin it belongs to."
            ) from None

    def __setitem__(self, key: StateKey[T], state: T) -> None:
        self._states[key] = state

    def __contains__(self, key: object) -> bool:
        return key in self._states

    def states(self) -> Iterator[tuple[StateKey[Any], Any]]:
        """Iterate over the states of mixins with their keys."""
        yield from self._states.items()

    def averages(self) -> dict[str, AveragedWeights]:
        """Return the averages of the weights, by the names of their parts in checkpoints."""
        return {key.name: state for key, state in self.states() if isinstance(state, AveragedWeights)}

    # ---- progress

    def begin_epoch(self) -> None:
        """Reset the epoch's state, unless the run is resumed within the epoch."""
        if not self.is_within_epoch:
            self.epoch = EpochState(LossSum(self.device))

    def read_epoch(self) -> Iterator[HostBatch[Any]]:
        """Begin to read the data of the epoch, and revise the plan if it differs from what was planned. A collective.

        Raises:
            DataError: The epoch is resumed within it, and its data differs.
        """
        batches = self.data.epoch(self.progress.epochs, self.progress.offset)
        self._check_epoch_data(self.data.partition_scheme.data)
        left, per_epoch = self.data.num_batches(self.progress.offset), self.data.num_batches()
        if left is not None and per_epoch is not None:
            self.epoch.num_batches = self.progress.batches + left
            steps_left, steps = (math.ceil(number / self.accumulation_steps) for number in (left, per_epoch))
            self._revise_plan(self.plan.revise(self.progress, steps_left, steps))
        return batches

    def _check_epoch_data(self, data: str) -> None:
        is_expected = self.resume_state is not None and self.resume_state.invariants["data"] == self.invariants["data"]
        if self.is_within_epoch and is_expected and self.epoch.data != data:
            raise DataError(
                f"The run was saved within an epoch of {self.epoch.data}, and the data now has {data}. Data whose "
                "length changes must have the length of that epoch again before it is read: set it in `set_epoch`, or "
                "save it with the run."
            )
        self.epoch.data = data

    def _revise_plan(self, plan: RunPlan) -> None:
        before, now = self.plan.known_total_steps, plan.known_total_steps
        self.plan = plan
        if before != now and self.distributed.is_main:
            warnings.warn(
                f"Epoch {self.progress.epochs + 1} has {self.epoch.num_batches} batches on each process: the run now "
                f"has {now} steps, and was planned with {before}. A learning-rate schedule of {before} steps does not "
                "change its length: give it the number of steps to expect, or let the data report its length.",
                stacklevel=2,
            )

    def count_window(self, window: Window[Any], step: StepResult, *, happened: bool) -> None:
        """Count the batches of a window, and its step unless the gradient scaler skipped the update."""
        before = self.progress
        self.progress = Progress(
            steps=step.step if happened else before.steps,
            epochs=before.epochs,
            batches=before.batches + window.read,
            offset=window.end,
            items=before.items + step.items if happened else before.items,
            seconds=time.monotonic() - self._started,
            skipped=before.skipped + (not happened),
        )
        self._check_epoch_end(window)
        self._skipped_steps = 0 if happened else self._skipped_steps + 1
        if self._skipped_steps == MAX_SKIPPED_STEPS:
            raise LossError(
                f"{MAX_SKIPPED_STEPS} steps in a row were skipped: the gradients are infinite or NaN at any scale. "
                "Look for the first such loss: StopOnNonFinite names its step."
            )
        if not happened:
            return
        self.epoch.learning_rate = step.learning_rate
        self.epoch.losses.add(step.loss, step.items)
        self.history.add_step(step, self.distributed)

    def skip_window(self, window: Window[Any]) -> None:
        """Count the batches of a window that were all left out by the collate function."""
        before = self.progress
        self.epoch.left_out += window.read
        self.progress = replace(
            before, batches=before.batches + window.read, offset=window.end, skipped=before.skipped + 1
        )
        self._check_epoch_end(window)

    def _check_epoch_end(self, window: Window[Any]) -> None:
        self.epoch.is_exhausted = window.read < self.accumulation_steps  # only the last window is smaller
        batches, promised = self.progress.batches, self.epoch.num_batches
        if promised is None or batches < promised:
            return
        self.epoch.is_exhausted = True
        if batches > ENDLESS * promised and self.plan.step_limit is None and self._max_seconds is None:
            raise DataError(
                f"The training data promised {promised} batches, and has given {batches} without an end. End the epoch "
                "after as many batches, or limit the run by max_steps."
            )

    @property
    def is_epoch_empty(self) -> bool:
        """Whether the epoch has given no batch so far, apart from those that the collate function left out."""
        return self.progress.batches == self.epoch.left_out

    def complete_epoch(self) -> None:
        """Count the epoch, whose data is exhausted."""
        self.progress = replace(self.progress, epochs=self.progress.epochs + 1, batches=0, offset=0)
        self.epoch.is_counted = True

    def reopen_epoch(self, progress: Progress) -> None:
        """Undo `complete_epoch`, because the evaluation at the end of the epoch was interrupted.

        Args:
            progress: Progress before `complete_epoch`.
        """
        self.progress, self.epoch.is_counted = progress, False

    @property
    def is_within_epoch(self) -> bool:
        """Whether the current epoch has begun and is not yet counted."""
        return self.progress.batches > 0

    @property
    def is_epoch_complete(self) -> bool:
        """Whether the run has trained on all data of the epoch."""
        return self.epoch.is_counted or self.epoch.is_exhausted

    def make_epoch_record(self, number: int, metrics: Mapping[str, float]) -> EpochRecord:
        """Return the record of the epoch. A collective."""
        losses, (logged, means) = self.epoch.losses, self.history.pop_logged_means()
        if taken := means.keys() & metrics.keys():
            raise LossError(f"train_step: logged[{min(taken)!r}] has the name of a training metric. Give it another.")
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
            logged=logged,
            train_metrics={**means, **metrics},
        )

    def current_values(self) -> dict[str, float]:
        """Return the values reported for the current weights, by name."""
        values: dict[str, float] = {}
        if self.evaluated_at.steps == self.progress.steps:
            for name, result in self.epoch.evaluations.items():
                values |= result.values(name)
        if self.epoch.is_counted:
            values |= replace(self.history[-1], evaluations={}).values()
        return values

    def close(self) -> None:
        """End the run: stop the workers of its loaders."""
        self.is_over = True
        for source in (self.data, *self.eval_data.values()):
            source.close()

    # ---- saving and resuming

    def state_dict(self) -> StateDict:
        """Return the state that all ranks share. `history.read_steps()` must have been called."""
        return {
            "seed": self.seed,
            "conditions": dict(self.invariants),
            "progress": asdict(self.progress),
            "evaluated_at": asdict(self.evaluated_at),
            "stopped": None if self._stopped_by is None or self.exit_code else asdict(self._stopped_by),
            "partial_evaluation": {name: asdict(result) for name, result in self.partial_evaluation.items()},
            "history": self.history.state_dict(),
            "epoch": self.epoch.state_dict(),
        }

    def rank_state_dict(self) -> StateDict:
        """Return the state of this rank."""
        was_applied = self.history.stop_reason is not None and self.exit_code is None
        return {
            "losses": self.epoch.losses.total,
            "stop_request": None if self._stop_request is None or was_applied else asdict(self._stop_request),
            "data": self.data.state_dict(),
        }

    def _restore(self, saved: ResumeState) -> None:
        shared, own = saved.shared, saved.rank_state
        self.progress, self.evaluated_at = saved.progress, Progress(**shared["evaluated_at"])
        self.partial_evaluation = {name: EvalResult(**result) for name, result in shared["partial_evaluation"].items()}
        self.history.load_state_dict(shared["history"])
        self._started -= self.progress.seconds
        self.epoch.load_state_dict(shared["epoch"])
        self.epoch.losses.total.copy_(own["losses"])
        self.data.load_state_dict(own["data"])
        if own["stop_request"] is not None:
            self._stop_request = StopRequest(**own["stop_request"])
        if shared["stopped"] is not None and shared["stopped"]["is_lasting"]:
            self._accept(StopRequest(**shared["stopped"]))
        self._accept(self.consensus.repeat_vote(self._stop_request, self.progress.steps))

    # ---- stopping

    def request_stop(self, reason: str) -> None:
        """Request the end of the run; all ranks stop after the same step. The first reason is kept."""
        self._request(StopRequest(reason, self.progress.steps, is_lasting=True))

    def request_termination(self, signal: str, exit_code: int) -> None:
        """Request the end of the run and of the process, because this rank received a signal."""
        reason = f"{signal} on rank {self.distributed.rank}"
        request = StopRequest(reason, self.progress.steps, exit_code, depends_on_clock=True)
        self._termination = self._termination or request

    def agree_to_stop(self, reason: str | None, *, at_epoch_end: bool = False) -> None:
        """Vote with all ranks on stopping.

        Args:
            reason: Why the trainer requests a stop now; None if it does not. Earlier requests count as well.
            at_epoch_end: Whether to wait for the decision. Between steps, the decision follows one step later.
        """
        if reason is not None:
            self._request(StopRequest(reason, self.progress.steps))
        request = self._clock_request() or self._stop_request
        if at_epoch_end:
            self._accept(self.consensus.agree_now(request))
        else:
            self._accept(self.consensus.poll(request, self.progress.steps))

    def agree_on_clock(self) -> None:
        """Vote with all ranks on signals and `max_time` alone, and wait for the decision."""
        self._accept(self.consensus.agree_now(self._clock_request()))

    def agree_to_terminate(self) -> bool:
        """Vote with all ranks on signals alone, within an evaluation. Return whether all ranks leave it now.

        Other requests wait for the end of the evaluation, which may be the last one of the run.
        """
        self._accept(self.consensus.poll(self._termination))
        return self.exit_code is not None

    def apply_pending_signal(self) -> None:
        """Apply a signal that arrived after the last vote, to this process alone."""
        self._accept(self._termination)

    def _request(self, request: StopRequest) -> None:
        self._stop_request = self._stop_request or request

    def _clock_request(self) -> StopRequest | None:
        is_time_up = self._max_seconds is not None and self.progress.seconds >= self._max_seconds
        return self._termination or (StopRequest(self._time_limit, depends_on_clock=True) if is_time_up else None)

    def _accept(self, decision: StopRequest | None) -> None:
        """Apply a decision: the first one, or the first one with an exit code."""
        if decision is None or self.exit_code is not None:
            return
        if self.history.stop_reason is None or decision.exit_code is not None:
            self.history.stop_reason, self.exit_code = decision.reason, decision.exit_code
        if decision.exit_code is None:
            self._stopped_by = decision

    @property
    def stays_stopped(self) -> bool:
        """Whether `trainer.stop()` has stopped the run, so that it stays stopped when it is resumed."""
        return self._stopped_by is not None and self._stopped_by.is_lasting

    @property
    def _time_limit(self) -> str:
        return f"max_time={self.options['max_time']} reached"

    @property
    def should_evaluate_at_end(self) -> bool:
        """Whether the run has reached its plan or `max_time`, and its last weights are not evaluated yet."""
        is_planned_end = self.history.stop_reason in (None, self._time_limit)
        return self.is_done() and is_planned_end and self.evaluated_at.steps < self.progress.steps

    def is_done(self) -> bool:
        """Return whether the plan is complete, or the ranks have agreed to stop."""
        return self.history.stop_reason is not None or is_done(self.progress, self.plan)

    def is_due(self, cadence: Cadence, last: Progress) -> bool:
        """Return whether something is due. For `Minutes`, the clock of rank 0 decides for all ranks."""
        due = cadence.is_due(self.progress, last)
        return self.distributed.broadcast(due) if isinstance(cadence, Minutes) else due


def is_done(progress: Progress, plan: RunPlan) -> bool:
    """Return whether a run with this plan is complete.

    Example:
        >>> is_done(Progress(steps=25), RunPlan.compute(num_epochs=3, steps_per_epoch=10, max_steps=25))
        True
    """
    if plan.step_limit is not None and progress.steps >= plan.step_limit:
        return True
    return plan.epoch_limit is not None and progress.epochs >= plan.epoch_limit

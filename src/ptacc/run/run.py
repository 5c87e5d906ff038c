"""The state of one run: created when `train()` starts, and kept until the next call."""

from __future__ import annotations

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
from ptacc.engines.base import Engine, learning_rates
from ptacc.errors import DataError, LossError, NoRunError
from ptacc.model.averaging import AveragedWeights
from ptacc.model.optimizer_modes import OptimizerModes
from ptacc.run.history import RunHistory
from ptacc.run.state import EpochState, ResumeState, StateKey
from ptacc.run.step_result import StepResult, means
from ptacc.run.stopping import StopState
from ptacc.run.window import Window
from ptacc.types.accumulation import AccumulationSchedule
from ptacc.types.aliases import T
from ptacc.types.arguments import DEFAULT_CADENCE, RunOptions, ends_within_epoch
from ptacc.types.monitor import ValueNames
from ptacc.types.outputs import EpochRecord, EvalResult, ValuesRecord
from ptacc.types.progress import Cadence, Minutes, Progress, RunPlan
from ptacc.types.protocols import StateDict

SHORTEST = 1e-9
"""The shortest time, in seconds, that a rate is computed from."""
MAX_SKIPPED_STEPS = 200
"""Consecutive steps that a gradient scaler may skip. Halved as often, its factor would be 0."""


@dataclass
class Run:
    """The state of one run of a trainer.

    Args:
        options: Arguments of `train()`.
        plan: Length of the run.
        optimizer_modes: Switches those optimizers that have modes.
        seed: Seed of the data order, and of all randomness in loading the data.
        data: Training batches of this rank.
        eval_data: Batches of each evaluation set on this rank, by the name of the set.
        stopping: Requests to stop the run, and what the ranks decided.
        accumulation: Batches of a step on each rank.
        retains_outputs: Whether `on_batch_end` needs the outputs of a step after the backward pass.
        value_names: Names of the values that it may report.
        invariants: What must be the same when the run is resumed, by name.
        resume_state: The saved run that this run resumes; None for a new run.
        evaluate_every: How often all sets are evaluated.
        evaluated_at: Progress at the last evaluation of all sets.
        reported_at: Progress at the last report of values. Its time is that of the end of the report.
        batch: Batch of the forward or backward pass in progress; None between steps.
        partial_evaluation: Results of the sets evaluated so far, in an evaluation that is in progress or interrupted.
        unreported: Values of evaluations since the last report, by name.
        is_consistent: Whether the run is between two steps, with nothing of the next step done, and can be saved.
        is_scheduled_evaluation: Whether the evaluation in progress is the loop's own. False if a hook evaluates.
        has_checked_monitors: Whether an evaluation has reported all values of evaluations that are monitored.
    """

    options: RunOptions
    plan: RunPlan
    seed: int
    engine: Engine
    optimizer_modes: OptimizerModes
    device: torch.device
    distributed: DistributedRuntime
    data: BatchSource
    eval_data: Mapping[str, BatchSource]
    history: RunHistory
    stopping: StopState
    accumulation: AccumulationSchedule
    retains_outputs: bool
    value_names: ValueNames
    invariants: Mapping[str, str]
    resume_state: ResumeState | None = None
    epoch: EpochState = field(init=False)
    evaluate_every: Cadence = field(init=False)
    progress: Progress = field(default_factory=Progress)
    evaluated_at: Progress = field(default_factory=Progress)
    reported_at: Progress = field(default_factory=Progress)
    batch: HostBatch[Any] | None = None
    partial_evaluation: dict[str, EvalResult] = field(default_factory=dict)
    unreported: dict[str, float] = field(default_factory=dict)
    is_consistent: bool = False
    is_scheduled_evaluation: bool = False
    has_checked_monitors: bool = False
    is_over: bool = False
    _skipped_steps: int = 0
    _started: float = field(default_factory=time.monotonic)
    _states: dict[StateKey[Any], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.evaluate_every = self.options.get("evaluate_every", DEFAULT_CADENCE)
        self.begin_epoch()
        if self.resume_state is not None:
            self._restore(self.resume_state)
        if self.resume_state is None or self.resume_state.shared["history"]["file"] is None:
            self.history.begin(self.seed, self.plan)
        if self.resume_state is not None:
            self.history.resume(self.progress.steps, self.progress.seconds, self.plan)

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

    @property
    def elapsed(self) -> float:
        """Seconds since the run started, without the time between a stop and the resumption."""
        return time.monotonic() - self._started

    def leave_out_setup(self) -> None:
        """Leave the time of setting the run up out of the items per second."""
        setup = self.elapsed - self.progress.seconds
        self.reported_at = replace(self.reported_at, seconds=self.reported_at.seconds + setup)

    def begin_epoch(self) -> None:
        """Reset the epoch's state, unless the run is resumed within the epoch."""
        if not self.is_within_epoch:
            self.epoch = EpochState(first_step=self.progress.steps + self.progress.skipped)

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
            self._revise_plan(self.accumulation.revise(self.plan, self.progress, left, per_epoch))
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

    def begin_step(self, window: Window[Any]) -> StepResult:
        """Return the result of the next step, still without losses."""
        self.distributed.count_progress()
        slots, before = self.engine.slots, self.progress
        number, epoch = before.steps + 1, before.epochs + 1
        return StepResult(number, epoch, window.total, slots[0].learning_rate, group_rates=learning_rates(slots))

    def count_window(self, window: Window[Any], step: StepResult, *, happened: bool) -> None:
        """Count the batches of a window, and its step unless the gradient scaler skipped the update."""
        before = self.progress
        self.progress = Progress(
            steps=step.step if happened else before.steps,
            epochs=before.epochs,
            batches=before.batches + window.read,
            offset=window.end,
            items=before.items + step.items if happened else before.items,
            seconds=self.elapsed,
            skipped=before.skipped + (not happened),
        )
        self._check_epoch_end(window)
        if not happened:
            self._count_skipped_step()
            return
        self._skipped_steps = 0
        self.epoch.learning_rate = step.learning_rate
        self.epoch.items += step.items
        self.history.add_step(step, self.distributed)

    def _count_skipped_step(self) -> None:
        self._skipped_steps += 1
        if self._skipped_steps == MAX_SKIPPED_STEPS:
            raise LossError(
                f"{MAX_SKIPPED_STEPS} steps in a row were skipped: the gradients are infinite or NaN at any scale. "
                "Look for the first such loss: StopOnNonFinite names its step."
            )

    def skip_window(self, window: Window[Any]) -> None:
        """Count the batches of a window that were all left out by the collate function."""
        before = self.progress
        self.epoch.left_out += window.read
        self.progress = replace(
            before, batches=before.batches + window.read, offset=window.end, skipped=before.skipped + 1
        )
        self._check_epoch_end(window)

    def _check_epoch_end(self, window: Window[Any]) -> None:
        self.epoch.is_exhausted = window.is_short
        batches, promised = self.progress.batches, self.epoch.num_batches
        if promised is None or batches < promised:
            return
        self.epoch.is_exhausted = True
        if batches > ENDLESS * promised and not ends_within_epoch(self.options):
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

    def count_epoch_steps(self) -> tuple[int, int | None]:
        """Return the steps of the epoch so far, and all of them if they are known. Skipped steps are included."""
        made = self.progress.steps + self.progress.skipped - self.epoch.first_step
        left = self.data.num_batches(self.progress.offset)
        return made, None if left is None else made + self.accumulation.count_steps(self.progress, left)

    @property
    def is_within_epoch(self) -> bool:
        """Whether the current epoch has begun and is not yet counted."""
        return self.progress.batches > 0

    @property
    def is_epoch_complete(self) -> bool:
        """Whether the run has trained on all data of the epoch."""
        return self.epoch.is_counted or self.epoch.is_exhausted

    def make_epoch_record(self, number: int, metrics: Mapping[str, float]) -> EpochRecord:
        """Return the record of the epoch. `history.read_steps()` must have been called."""
        sums, logged, by_steps = self.history.pop_epoch()
        if taken := by_steps.keys() & metrics.keys():
            raise LossError(f"train_step: logged[{min(taken)!r}] has the name of a training metric. Give it another.")
        return EpochRecord(
            epoch=number,
            step=self.progress.steps,
            train_loss=sums.loss,
            items=sums.items,
            seconds=time.monotonic() - self.epoch.started,
            learning_rate=float(self.epoch.learning_rate),
            is_complete=self.epoch.is_counted,
            evaluations=dict(self.epoch.evaluations),
            logged=logged,
            train_metrics={**by_steps, **metrics},
        )

    @property
    def has_unreported_steps(self) -> bool:
        """Whether there are steps to report now. A run that a signal ends reports them when it resumes."""
        return self.reported_at.steps < self.progress.steps and self.stopping.exit_code is None

    def make_report(self, train_metrics: Mapping[str, float]) -> ValuesRecord:
        """Return the values since the last report, with those of the evaluation at this step. A collective.

        Args:
            train_metrics: Metrics over the training batches of an epoch that has ended.

        Raises:
            LossError: A value was logged by the name of an evaluated one.
        """
        history, epoch = self.history, self.progress.epochs + self.is_within_epoch
        history.read_steps(self.distributed)
        sums, seconds = history.pop_report(), self.progress.seconds - self.reported_at.seconds
        logged = {f"train/{n}" if n in history.step_names else n: value for n, value in means(sums.logged).items()}
        values: dict[str, float] = {"epoch": epoch}
        if sums.items:
            last = history.steps[-1]
            rates = {name: last.logged[name] for name in learning_rates(self.engine.slots) if name in last.logged}
            values |= {"train_loss": sums.loss, "learning_rate": last.learning_rate, **rates}
            values["items_per_second"] = sums.items / max(seconds, SHORTEST)
        metrics = {f"train/{name}": value for name, value in train_metrics.items() if name not in history.step_names}
        evaluated, self.unreported = self.unreported, {}
        if taken := logged.keys() & (metrics.keys() | evaluated.keys()):
            raise LossError(f"{min(taken)!r} was logged, and is the name of a metric. Log it under another name.")
        return ValuesRecord(self.progress.steps, epoch, values | logged | metrics | evaluated)

    def complete_evaluation(self) -> None:
        """Record the results of all sets."""
        results, self.partial_evaluation = self.partial_evaluation, {}
        self.evaluated_at = self.progress
        self.epoch.evaluations |= results
        self.history.add_evaluations(self.progress.steps, self.progress.epochs + self.is_within_epoch, results)
        for name, result in results.items():
            self.unreported |= result.values(name)

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
        """End the run: stop the workers of its loaders, and close the engine."""
        self.is_over = True
        self.engine.close()
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
            "reported_at": asdict(self.reported_at),
            "stopped": self.stopping.state_dict(),
            "partial_evaluation": {name: asdict(result) for name, result in self.partial_evaluation.items()},
            "history": self.history.state_dict(),
            "epoch": self.epoch.state_dict(),
        }

    def rank_state_dict(self) -> StateDict:
        """Return the state of this rank."""
        return {
            "stop_request": self.stopping.request_state_dict(),
            "data": self.data.state_dict(),
        }

    def _restore(self, saved: ResumeState) -> None:
        shared, own = saved.shared, saved.rank_state
        self.progress, self.evaluated_at = saved.progress, Progress(**shared["evaluated_at"])
        self.reported_at = Progress(**shared["reported_at"])
        self.partial_evaluation = {name: EvalResult(**result) for name, result in shared["partial_evaluation"].items()}
        self.history.load_state_dict(shared["history"])
        self._started -= self.progress.seconds
        self.epoch.load_state_dict(shared["epoch"])
        self.data.load_state_dict(own["data"])
        self.stopping.restore(shared["stopped"], own["stop_request"], self.progress.steps)

    # ---- the end

    @property
    def should_evaluate_at_end(self) -> bool:
        """Whether the run has reached its plan or `max_time`, and its last weights are not evaluated yet."""
        return self.is_done() and not self.stopping.is_early and self.evaluated_at.steps < self.progress.steps

    def is_done(self) -> bool:
        """Return whether the plan is complete, or the ranks have agreed to stop."""
        return self.stopping.decision is not None or self.plan.is_complete(self.progress)

    def is_due(self, cadence: Cadence, last: Progress) -> bool:
        """Return whether something is due. For `Minutes`, the clock of rank 0 decides for all ranks."""
        due = cadence.is_due(self.progress, last)
        return self.distributed.broadcast(due) if isinstance(cadence, Minutes) else due

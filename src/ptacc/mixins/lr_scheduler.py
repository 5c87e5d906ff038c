"""Learning-rate schedules."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR
from typing_extensions import override

from ptacc.core.checks import check_monitor
from ptacc.core.hooks import Mixin
from ptacc.errors import OptionError, SchedulerError
from ptacc.run.history import StepResult
from ptacc.run.state import StateKey
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EpochRecord
from ptacc.types.progress import RunPlan
from ptacc.types.protocols import LRSchedulerLike, PlateauSchedulerLike, SchedulerFactory
from ptacc.validation import value_text

SCHEDULER: StateKey[LRSchedulerLike | PlateauSchedulerLike] = StateKey("scheduler")


class LRSchedulerMixin(Mixin):
    """Schedules the learning rate: once a step that happened, or once an epoch, on any number of processes.

    Options:
        create_scheduler: Makes the schedule of a run from the optimizer and the `RunPlan`, whose `total_steps`,
            `steps_per_epoch` and `num_epochs` are in optimizer steps. Any torch scheduler, `ReduceLROnPlateau` too.
        scheduler_interval: `"step"`, or `"epoch"` for a schedule that is sized by `num_epochs`. A `ReduceLROnPlateau`
            always steps at an epoch's end.
        scheduler_monitor: The value that a `ReduceLROnPlateau` follows.

    Hooks: `on_run_start`, `on_step_end`, `on_epoch_end`, `around_run`.

    Combines with: everything. A step that the gradient scaler skipped does not move the schedule.

    Example:
        >>> from torch.optim import Optimizer
        >>> from torch.optim.lr_scheduler import OneCycleLR
        >>> from ptacc import LRSchedulerMixin, RunPlan, Trainer
        >>> from ptacc.protocols import SchedulerFactory
        >>> def one_cycle(optimizer: Optimizer, plan: RunPlan) -> OneCycleLR:
        ...     return OneCycleLR(optimizer, max_lr=0.1, total_steps=plan.total_steps)
        >>> class MyTrainer(LRSchedulerMixin, Trainer):
        ...     create_scheduler: SchedulerFactory = one_cycle
    """

    create_scheduler: SchedulerFactory
    scheduler_interval: Literal["step", "epoch"] = "step"
    scheduler_monitor: str | Monitor = "eval_loss"

    @override
    def check_options(self) -> None:
        """Refuse an interval that is none, and a schedule in place of what makes one."""
        factory: object = self.create_scheduler
        is_torchs_class = isinstance(factory, type) and factory.__module__.startswith("torch.")
        if is_torchs_class or not callable(factory):
            raise OptionError(
                f"{type(self).__name__}(create_scheduler={value_text(factory)}): must be a function that makes the "
                "schedule of a run: `create_scheduler=lambda optimizer, plan: StepLR(optimizer, step_size=5)`."
            )
        if self.scheduler_interval not in ("step", "epoch"):
            raise OptionError(
                f'{type(self).__name__}(scheduler_interval={self.scheduler_interval!r}): must be "step" or "epoch".'
            )

    @property
    def scheduler(self) -> LRSchedulerLike | PlateauSchedulerLike:
        """The schedule of the current run, or of the last one."""
        return self.run[SCHEDULER]

    @override
    def on_run_start(self) -> None:
        """Make the run's schedule."""
        super().on_run_start()
        optimizer = self.run.engine.slots[0].optimizer
        scheduler = self.create_scheduler(optimizer, self.run.plan)
        check_scheduler(scheduler, optimizer, self.run.plan, self.scheduler_interval)
        if follows_a_value(scheduler):
            check_monitor(as_monitor(self.scheduler_monitor), self.run.value_names, self, "scheduler_monitor")
        self.run[SCHEDULER] = scheduler

    @override
    def on_step_end(self, step: StepResult) -> None:
        """Move a schedule of steps on."""
        super().on_step_end(step)
        if self.scheduler_interval == "step" and not follows_a_value(self.scheduler):
            cast(LRSchedulerLike, self.scheduler).step()

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        """Move a schedule of epochs on, or one that follows a value."""
        super().on_epoch_end(record)
        if follows_a_value(self.scheduler):
            name = as_monitor(self.scheduler_monitor).name
            if name in record.values():
                cast(PlateauSchedulerLike, self.scheduler).step(record.values()[name])
        elif self.scheduler_interval == "epoch" and record.is_complete:
            cast(LRSchedulerLike, self.scheduler).step()

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Put the scheduled values back to what they were, so that a second run starts like the first."""
        remembered = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        try:
            with super().around_run():
                yield
        finally:
            # Not the groups of before: a run that goes on from a checkpoint has loaded others.
            for group, values in zip(self.optimizer.param_groups, remembered, strict=True):
                for name in group.keys() - values.keys() - {"params"}:
                    del group[name]  # such as `initial_lr`, from which the next schedule would start
                group.update(values)

    @override
    @classmethod
    def law_options(cls) -> Mapping[str, Any]:
        """Return a schedule that changes nothing."""
        return {"create_scheduler": constant_rate}


def constant_rate(optimizer: Optimizer, plan: RunPlan) -> LRSchedulerLike:
    """Make a schedule that changes nothing, whatever the plan."""
    return ConstantLR(optimizer, factor=1.0, total_iters=plan.known_total_steps or 1)


def follows_a_value(scheduler: LRSchedulerLike | PlateauSchedulerLike) -> bool:
    """Say whether the schedule's `step` has to be given a value, as that of `ReduceLROnPlateau`."""
    return has_to_be_given_a_value(type(scheduler))


@functools.cache
def has_to_be_given_a_value(kind: type[LRSchedulerLike | PlateauSchedulerLike]) -> bool:
    """Say so of a class of schedules: looking takes longer than a schedule's step."""
    try:
        inspect.signature(kind.step).bind(None)
    except TypeError:
        return True
    return False


def check_scheduler(
    scheduler: LRSchedulerLike | PlateauSchedulerLike, optimizer: Optimizer, plan: RunPlan, interval: str
) -> None:
    """Raise `SchedulerError` for a schedule of another optimizer, or one that ends before the run does."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step"):
        raise SchedulerError(f"create_scheduler returned {name}: it must return the schedule. Check its `return`.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise SchedulerError(
            f"create_scheduler made a {name} for another optimizer than the trainer's. Use the one it is given: "
            f"`create_scheduler=lambda optimizer, plan: {name}(optimizer, ...)`."
        )
    needed = plan.known_total_steps if interval == "step" else plan.known_epochs
    length = getattr(scheduler, "total_steps", None)
    if isinstance(length, int) and needed is not None and length < needed:
        raise SchedulerError(
            f"create_scheduler made a {name} of {length} steps, and the run has {needed} {interval}s. Size it by the "
            f"plan: `total_steps=plan.{'total_steps' if interval == 'step' else 'num_epochs'}`."
        )

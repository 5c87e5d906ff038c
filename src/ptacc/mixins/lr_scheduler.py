"""Learning-rate schedules."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Literal, cast

from torch.optim import Optimizer
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
    """Steps a learning-rate scheduler, after each optimizer step or after each epoch.

    Each run creates a scheduler of its own. After the run, the learning rate and the other scheduled values of the
    optimizer are restored.

    Options:
        create_scheduler: Creates the scheduler of a run from the optimizer and the `RunPlan`, whose `total_steps` and
            `steps_per_epoch` count optimizer steps, whatever the number of ranks. Any torch scheduler, including
            `ReduceLROnPlateau`.
        scheduler_interval: When the scheduler steps: `"step"` or `"epoch"`. A `ReduceLROnPlateau` always steps at the
            end of an epoch.
        scheduler_monitor: The value passed to `ReduceLROnPlateau.step`: a name or a `Monitor`.

    Hooks: `on_run_start`, `on_step_end`, `on_epoch_end`, `monitors`, `around_run`.

    Combines with: everything. The scheduler does not step when the gradient scaler skips a step.

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
        factory: object = self.create_scheduler
        is_torch_class = isinstance(factory, type) and factory.__module__.startswith("torch.")
        if is_torch_class or not callable(factory):
            raise OptionError(
                f"{type(self).__name__}(create_scheduler={value_text(factory)}): must be a function that creates "
                "the scheduler of a run: `create_scheduler=lambda optimizer, plan: StepLR(optimizer, step_size=5)`."
            )
        if self.scheduler_interval not in ("step", "epoch"):
            raise OptionError(
                f'{type(self).__name__}(scheduler_interval={self.scheduler_interval!r}): must be "step" or "epoch".'
            )

    @property
    def scheduler(self) -> LRSchedulerLike | PlateauSchedulerLike:
        """The scheduler of the current or last run."""
        return self.run[SCHEDULER]

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        optimizer = self.run.engine.slots[0].optimizer
        scheduler = self.create_scheduler(optimizer, self.run.plan)
        check_scheduler(scheduler, optimizer, self.run.plan, self.scheduler_interval)
        if needs_value(scheduler):
            check_monitor(as_monitor(self.scheduler_monitor), self.run.value_names, self, "scheduler_monitor")
        self.run[SCHEDULER] = scheduler

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        if self.scheduler_interval == "step" and not needs_value(self.scheduler):
            cast(LRSchedulerLike, self.scheduler).step()

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        if needs_value(self.scheduler):
            name = as_monitor(self.scheduler_monitor).name
            if name in record.values():
                cast(PlateauSchedulerLike, self.scheduler).step(record.values()[name])
        elif self.scheduler_interval == "epoch" and record.is_complete:
            cast(LRSchedulerLike, self.scheduler).step()

    @override
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        needs_monitor = self.is_running and SCHEDULER in self.run and needs_value(self.scheduler)
        return (*super().monitors(), *([(self, as_monitor(self.scheduler_monitor))] if needs_monitor else []))

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        saved = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        try:
            with super().around_run():
                yield
        finally:
            # A resumed run has loaded other group objects.
            for group, values in zip(self.optimizer.param_groups, saved, strict=True):
                for name in group.keys() - values.keys() - {"params"}:
                    del group[name]  # such as `initial_lr`, which the next scheduler would start from
                group.update(values)


def needs_value(scheduler: LRSchedulerLike | PlateauSchedulerLike) -> bool:
    """Whether `scheduler.step` needs a value, as that of `ReduceLROnPlateau` does."""
    return _class_needs_value(type(scheduler))


@functools.cache  # inspecting a signature takes longer than a step of a scheduler
def _class_needs_value(cls: type[LRSchedulerLike | PlateauSchedulerLike]) -> bool:
    try:
        inspect.signature(cls.step).bind(None)
    except TypeError:
        return True
    return False


def check_scheduler(
    scheduler: LRSchedulerLike | PlateauSchedulerLike, optimizer: Optimizer, plan: RunPlan, interval: str
) -> None:
    """Raise `SchedulerError` for a scheduler of another optimizer, and for one with fewer steps than the run."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step"):
        raise SchedulerError(f"create_scheduler returned {name}: it must return the scheduler. Check its `return`.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise SchedulerError(
            f"create_scheduler returned a {name} for an optimizer other than the trainer's. Use its argument: "
            f"`create_scheduler=lambda optimizer, plan: {name}(optimizer, ...)`."
        )
    needed = plan.known_total_steps if interval == "step" else plan.known_epochs
    length = getattr(scheduler, "total_steps", None)
    if isinstance(length, int) and needed is not None and length < needed:
        raise SchedulerError(
            f"create_scheduler returned a {name} of {length} steps, and the run has {needed} {interval}s. Take the "
            f"length from the plan: `total_steps=plan.{'total_steps' if interval == 'step' else 'num_epochs'}`."
        )

"""Learning-rate schedules."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import field
from typing import cast

from typing_extensions import override

from ptacc.core.checks import check_monitor
from ptacc.core.hooks import Mixin
from ptacc.core.monitoring import epoch_values, evaluated_values
from ptacc.errors import OptionError
from ptacc.model.optimizer_state import save_settings
from ptacc.run.schedule import SCHEDULES, Interval, Schedule, check_factories, schedule_key
from ptacc.run.step_result import StepResult
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.protocols import PlateauSchedulerLike, SchedulerFactory, SchedulerLike


class LRSchedulerMixin(Mixin):
    """Steps a learning-rate scheduler, after each optimizer step or after each epoch.

    Each run creates a scheduler of its own. After the run, the learning rate and the other scheduled values of the
    optimizer are restored.

    Options:
        create_scheduler: Creates the scheduler of a run from the optimizer and the `RunPlan`, whose `total_steps` and
            `steps_per_epoch` count optimizer steps, whatever the number of ranks. Any scheduler of torch, including
            `ReduceLROnPlateau`, of transformers or of timm. It is called for each optimizer of an `OptimizerDict`.
        create_scheduler_of: Such functions by the name of an optimizer, for those with a schedule of their own.
        scheduler_interval: When the scheduler steps: `"step"` or `"epoch"`. A `ReduceLROnPlateau` always steps when its
            value is reported: after each evaluation of the run, or for a training value at the end of each epoch. A
            scheduler of timm counts steps or epochs as its own `t_in_epochs` says.
        scheduler_monitor: The value passed to `ReduceLROnPlateau.step`: a name or a `Monitor`.

    Hooks: `on_run_start`, `on_step_end`, `on_evaluation_end`, `on_epoch_end`, `monitors`, `around_run`.

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
    create_scheduler_of: Mapping[str, SchedulerFactory] = field(default_factory=dict)
    scheduler_interval: Interval = "step"
    scheduler_monitor: str | Monitor = "eval_loss"

    @override
    def check_options(self) -> None:
        owner, labels = type(self).__name__, [slot.label for slot in self.optimizer_slots()]
        check_factories(owner, self.create_scheduler, self.create_scheduler_of, labels)
        if self.scheduler_interval not in ("step", "epoch"):
            raise OptionError(f'{owner}(scheduler_interval={self.scheduler_interval!r}): must be "step" or "epoch".')

    @property
    def scheduler(self) -> SchedulerLike:
        """The scheduler of the current or last run, of a trainer with one optimizer."""
        return self.run[schedule_key("optimizer")].scheduler

    @property
    def schedulers(self) -> Mapping[str, SchedulerLike]:
        """The schedulers of the current or last run, by the names of their optimizers."""
        return {name: schedule.scheduler for name, schedule in self.run[SCHEDULES].items()}

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        run = self.run
        run[SCHEDULES] = {}
        for slot in run.engine.slots:
            create = self.create_scheduler_of.get(slot.label, self.create_scheduler)
            schedule = Schedule(create, self.scheduler_interval, run, self.trained_modules, slot.optimizer)
            if schedule.kind == "values":
                check_monitor(as_monitor(self.scheduler_monitor), run.value_names, self, "scheduler_monitor")
            run[SCHEDULES][slot.label] = run[schedule_key(slot.name)] = schedule

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        for schedule in self.run[SCHEDULES].values():
            schedule.end_step()

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        self._step_on_value(evaluated_values(self, name, result))

    def _step_on_value(self, values: Mapping[str, float]) -> None:
        """Step the schedulers that need a value, if the value is among those that are reported now."""
        name = as_monitor(self.scheduler_monitor).name
        for schedule in self.run[SCHEDULES].values() if name in values else ():
            if schedule.kind == "values":
                cast(PlateauSchedulerLike, schedule.scheduler).step(values[name])

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        if record.is_complete:
            for schedule in self.run[SCHEDULES].values():
                schedule.end_epoch()
        self._step_on_value(epoch_values(record))

    @override
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        schedules = self.run[SCHEDULES].values() if self.is_running and SCHEDULES in self.run else ()
        needs_monitor = any(schedule.kind == "values" for schedule in schedules)
        return (*super().monitors(), *([(self, as_monitor(self.scheduler_monitor))] if needs_monitor else []))

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        restore_settings = save_settings(self.optimizer)
        try:
            with super().around_run():
                yield
        finally:
            restore_settings()

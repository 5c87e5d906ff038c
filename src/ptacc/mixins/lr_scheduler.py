"""Learning-rate schedules."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import cast

from typing_extensions import override

from ptacc.core.checks import check_monitor
from ptacc.core.hooks import Mixin
from ptacc.core.monitoring import epoch_values, evaluated_values
from ptacc.errors import OptionError
from ptacc.model.optimizer_state import save_settings
from ptacc.run.history import StepResult
from ptacc.run.schedule import Interval, Schedule
from ptacc.run.state import StateKey
from ptacc.types.monitor import Monitor, as_monitor
from ptacc.types.outputs import EpochRecord, EvalResult
from ptacc.types.protocols import PlateauSchedulerLike, SchedulerFactory, SchedulerLike
from ptacc.validation import value_text

SCHEDULE: StateKey[Schedule] = StateKey("scheduler")


class LRSchedulerMixin(Mixin):
    """Steps a learning-rate scheduler, after each optimizer step or after each epoch.

    Each run creates a scheduler of its own. After the run, the learning rate and the other scheduled values of the
    optimizer are restored.

    Options:
        create_scheduler: Creates the scheduler of a run from the optimizer and the `RunPlan`, whose `total_steps` and
            `steps_per_epoch` count optimizer steps, whatever the number of ranks. Any scheduler of torch, including
            `ReduceLROnPlateau`, of transformers or of timm.
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
    scheduler_interval: Interval = "step"
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
    def scheduler(self) -> SchedulerLike:
        """The scheduler of the current or last run."""
        return self.run[SCHEDULE].scheduler

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        schedule = Schedule(self.create_scheduler, self.scheduler_interval, self.run, self.unwrapped_model)
        if schedule.kind == "values":
            check_monitor(as_monitor(self.scheduler_monitor), self.run.value_names, self, "scheduler_monitor")
        self.run[SCHEDULE] = schedule

    @override
    def on_step_end(self, step: StepResult) -> None:
        super().on_step_end(step)
        self.run[SCHEDULE].end_step()

    @override
    def on_evaluation_end(self, name: str, result: EvalResult) -> None:
        super().on_evaluation_end(name, result)
        self._step_on_value(evaluated_values(self, name, result))

    def _step_on_value(self, values: Mapping[str, float]) -> None:
        """Step a scheduler that needs a value, if the value is among those that are reported now."""
        name = as_monitor(self.scheduler_monitor).name
        if name in values and self.run[SCHEDULE].kind == "values":
            cast(PlateauSchedulerLike, self.scheduler).step(values[name])

    @override
    def on_epoch_end(self, record: EpochRecord) -> None:
        super().on_epoch_end(record)
        if record.is_complete:
            self.run[SCHEDULE].end_epoch()
        self._step_on_value(epoch_values(record))

    @override
    def monitors(self) -> tuple[tuple[object, Monitor], ...]:
        needs_monitor = self.is_running and SCHEDULE in self.run and self.run[SCHEDULE].kind == "values"
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

"""The scheduler of a run: how it steps, and how it resumes.

```
step(epoch=None)                                   every torch scheduler, those of transformers      "steps"
step(metrics)                                      ReduceLROnPlateau, GreedyLR                       "values"
step(epoch, metric=None), step_update(num_updates) those of timm                                     "counts"
```

A resumed run with the same limits and the same data loads the state of the scheduler. If they have changed, the state
would keep the old length: a new scheduler is created, with the settings that the optimizer had at the start of the run,
and is brought to the present step, as if the run had had the new length from its start.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ptacc.errors import OptionError, SchedulerError
from ptacc.model.optimizer_state import group_names
from ptacc.run.run import Run
from ptacc.run.state import StateKey
from ptacc.tensors.structures import map_tensors
from ptacc.types.progress import RunPlan
from ptacc.types.protocols import (
    CountedSchedulerLike,
    LRSchedulerLike,
    SchedulerFactory,
    SchedulerLike,
    StateDict,
)
from ptacc.validation import did_you_mean, value_text

Interval: TypeAlias = Literal["step", "epoch"]
Kind: TypeAlias = Literal["steps", "values", "counts"]
NO_SETTINGS = frozenset({"params", "param_names"})
"""What a parameter group holds besides settings."""
VALUE_NAME = re.compile("metric|loss|value|score")
"""Names of the argument of `step` that is a monitored value, as a part of them."""


@dataclass
class Schedule:
    """The scheduler of a run, with what is needed to create it again.

    Args:
        create: Creates the scheduler.
        interval: When a scheduler of kind `"steps"` steps.
        run: The run.
        model: The model, and what is trained with it, which has the names of the optimizer's parameters.
        optimizer: The optimizer that it schedules.
    """

    create: SchedulerFactory
    interval: Interval
    run: Run
    model: nn.Module
    optimizer: Optimizer
    scheduler: SchedulerLike = field(init=False)
    kind: Kind = field(init=False)

    def __post_init__(self) -> None:
        self._num_groups = len(self.optimizer.param_groups)
        self._length = describe_length(self.run, self.interval)  # now, since the plan may be revised during the run
        self._initial = [get_settings(group) for group in self.optimizer.param_groups]
        self.scheduler = self.create(self.optimizer, self.run.plan)
        check_scheduler(self.scheduler, self.optimizer, self.run.plan, self.interval)
        self.kind = get_kind(self.scheduler)

    # ---- stepping

    def end_step(self) -> None:
        """Step after an optimizer step, if the scheduler counts steps."""
        if self.kind == "counts":
            self._check_groups()
            cast(CountedSchedulerLike, self.scheduler).step_update(self.run.progress.steps)
        elif self.kind == "steps" and self.interval == "step":
            self._check_groups()
            cast(LRSchedulerLike, self.scheduler).step()

    def end_epoch(self) -> None:
        """Step after a complete epoch, if the scheduler counts epochs."""
        self._check_groups()
        if self.kind == "counts":
            cast(CountedSchedulerLike, self.scheduler).step(self.run.progress.epochs)
        elif self.kind == "steps" and self.interval == "epoch":
            cast(LRSchedulerLike, self.scheduler).step()

    def _check_groups(self) -> None:
        if len(self.optimizer.param_groups) != self._num_groups:
            raise SchedulerError(
                f"The optimizer has {len(self.optimizer.param_groups)} parameter groups, and its "
                f"{type(self.scheduler).__name__} was created for {self._num_groups}. Add the groups before train(); "
                "their parameters may be frozen until they are to be trained."
            )

    # ---- saving and resuming

    def state_dict(self) -> StateDict:
        """Return the state of the scheduler, with what it was created for: length, groups and settings."""
        groups = [min(names, default="") for names in group_names(self.model, self.optimizer)]
        # A schedule of counts needs no state, and may hold functions.
        state = {} if self.kind == "counts" else self.scheduler.state_dict()
        return {"length": self._length, "groups": groups, "initial": self._initial, "state": state}

    def load_state_dict(self, state_dict: StateDict, *, is_same_class: bool = True) -> None:
        """Restore the scheduler. The state of the optimizer and the progress of the run have been restored before.

        Raises:
            SchedulerError: The scheduler was saved for another length, or for groups in another order, and cannot be
                brought to the present step.
        """
        present = self.state_dict()
        has_order = state_dict["groups"] == present["groups"]
        if self.kind == "values" and not has_order:
            raise SchedulerError(
                f"The optimizer's parameter groups are in another order than in the checkpoint, whose "
                f"{type(self.scheduler).__name__} has values for each of them. Create the groups in the order "
                f"{', '.join(state_dict['groups'])}: these are their first parameters."
            )
        by_group = dict(zip(state_dict["groups"], state_dict["initial"], strict=True))
        names = zip(present["groups"], self._initial, strict=True)
        self._initial = state_dict["initial"] if has_order else [by_group.get(name, here) for name, here in names]
        is_alike = has_order and state_dict["length"] == present["length"]
        can_load = self.kind == "values" or (self.kind == "steps" and (is_alike or self._is_over()))
        if is_same_class and can_load:
            self.scheduler.load_state_dict(state_dict["state"])
        elif self.kind != "values":  # else another class begins with the next value
            self._create_at_present_step()

    def _create_at_present_step(self) -> None:
        """Create the scheduler again, and advance it from its start. Settings that it does not change are kept."""
        groups = self.optimizer.param_groups
        loaded = [dict(group) for group in groups]
        for group, settings in zip(groups, self._initial, strict=True):
            for name in group.keys() - settings.keys() - NO_SETTINGS:
                del group[name]
            group.update(map_tensors(torch.clone, settings))
        initial = [dict(group) for group in groups]
        self.scheduler = self.create(self.optimizer, self.run.plan)
        try:
            self._advance()
        except Exception as error:
            raise SchedulerError(
                f"The run resumes after step {self.run.progress.steps} with another length, and "
                f"{type(self.scheduler).__name__} cannot be brought to that step: {error} Take its length from the "
                "plan, or resume with the length that the run had."
            ) from error
        for group, before, values in zip(groups, initial, loaded, strict=True):
            group.update({name: value for name, value in values.items() if not is_scheduled(name, before, group)})

    def _advance(self) -> None:
        progress = self.run.progress
        if self.kind == "counts":
            scheduler = cast(CountedSchedulerLike, self.scheduler)
            if progress.steps:
                scheduler.step_update(progress.steps)
            if progress.epochs:
                scheduler.step(progress.epochs)
            return
        with warnings.catch_warnings():  # the optimizer has not stepped in this process
            warnings.filterwarnings("ignore", "(Detected call of `lr_scheduler.step|Seems like `optimizer.step)")
            for _ in range(self._count()):
                cast(LRSchedulerLike, self.scheduler).step()

    def _count(self) -> int:
        """Return how often a scheduler of kind `"steps"` has stepped."""
        progress = self.run.progress
        return progress.steps if self.interval == "step" else progress.epochs

    def _is_over(self) -> bool:
        """Return whether the run is past its new length, so that the scheduler will not step again."""
        length = planned_count(self.run.plan, self.interval)
        return length is not None and self._count() > length


SCHEDULES: StateKey[dict[str, Schedule]] = StateKey("schedules", saved=False)
"""The schedules by the names of their optimizers. Each is a state of its own in checkpoints."""


@functools.cache
def schedule_key(optimizer: str) -> StateKey[Schedule]:
    """Return the key of the schedule of an optimizer, from the name of its part in checkpoints."""
    return StateKey(optimizer.replace("optimizer", "scheduler", 1))


def describe_length(run: Run, interval: Interval) -> dict[str, object]:
    """Return what the length of a schedule depends on. The total of a resumed run depends on its progress as well."""
    return {
        "interval": interval,
        "steps_per_epoch": run.plan.known_steps_per_epoch,
        **{name: run.options.get(name) for name in ("num_epochs", "max_steps")},
        **{name: run.invariants[name] for name in ("data", "batch_size", "accumulation_steps")},
    }


def get_settings(group: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings of a parameter group, with copies of tensors and containers."""
    return map_tensors(torch.clone, {name: value for name, value in group.items() if name not in NO_SETTINGS})


def with_settings(group: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a parameter group with other settings, and with its parameters."""
    return {name: value for name, value in group.items() if name in NO_SETTINGS} | dict(settings)


def get_kind(scheduler: SchedulerLike) -> Kind:
    """Return how a scheduler steps, by the arguments of its `step`.

    Raises:
        SchedulerError: It steps in a way that is not known here.
    """
    name, parameters = type(scheduler).__name__, inspect.signature(scheduler.step).parameters.values()
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in optional]
    if isinstance(getattr(scheduler, "lr_scheduler", None), ReduceLROnPlateau):
        raise SchedulerError(
            f"create_scheduler returned a {name}, whose state_dict() does not contain its counters, so that a run "
            "could not be resumed. Return torch's ReduceLROnPlateau."
        )
    if hasattr(scheduler, "step_update") and required == ["epoch"]:
        return "counts"
    if not required and not hasattr(scheduler, "step_update"):
        return "steps"
    if len(required) == 1 and VALUE_NAME.search(required[0]):
        return "values"
    raise SchedulerError(
        f"create_scheduler returned a {name}, whose step({', '.join(p.name for p in parameters)}) is not known: it "
        "must be step(), step(metrics) for a schedule that follows a monitored value, or step(epoch) with "
        "step_update(num_updates), as in timm. Wrap it in a class with one of them."
    )


def is_scheduled(name: str, before: Mapping[str, object], group: Mapping[str, object]) -> bool:
    """Return whether a scheduler has set a setting of a parameter group, or could have changed it in place."""
    value = group.get(name)
    return name in group and (name == "lr" or value is not before.get(name) or isinstance(value, Tensor | list))


def planned_count(plan: RunPlan, interval: Interval) -> int | None:
    """Return how often a scheduler steps in a run, None if that is unknown."""
    return plan.known_total_steps if interval == "step" else plan.known_epochs


def check_factories(owner: str, create: object, create_of: Mapping[str, object], optimizers: Sequence[str]) -> None:
    """Raise `OptionError` for what cannot create a scheduler, and for a name that no optimizer has."""
    for factory in (create, *create_of.values()):
        is_torch_class = isinstance(factory, type) and factory.__module__.startswith("torch.")
        if is_torch_class or not callable(factory):
            raise OptionError(
                f"{owner}(create_scheduler={value_text(factory)}): must be a function that creates the scheduler of a "
                "run: `create_scheduler=lambda optimizer, plan: StepLR(optimizer, step_size=5)`."
            )
    if unknown := [name for name in create_of if name not in optimizers]:
        raise OptionError(
            f"{owner}(create_scheduler_of={{{unknown[0]!r}: ...}}): the optimizers are {', '.join(optimizers)}. "
            f"{did_you_mean(unknown[0], optimizers)}".rstrip()
        )


def check_scheduler(scheduler: SchedulerLike, optimizer: Optimizer, plan: RunPlan, interval: Interval) -> None:
    """Raise `SchedulerError` for a scheduler of another optimizer, and for one with fewer steps than the run."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "step"):
        raise SchedulerError(f"create_scheduler returned {name}: it must return the scheduler. Check its `return`.")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise SchedulerError(
            f"create_scheduler returned a {name} for an optimizer other than the trainer's. Use its argument: "
            f"`create_scheduler=lambda optimizer, plan: {name}(optimizer, ...)`."
        )
    if getattr(scheduler, "interval", interval) != interval:
        raise SchedulerError(f'create_scheduler returned a {name}, which counts steps: use scheduler_interval="step".')
    needed, length = planned_count(plan, interval), getattr(scheduler, "total_steps", None)
    if isinstance(length, int) and needed is not None and length < needed:
        raise SchedulerError(
            f"create_scheduler returned a {name} of {length} steps, and the run has {needed} {interval}s. Take the "
            f"length from the plan: `total_steps=plan.{'total_steps' if interval == 'step' else 'num_epochs'}`."
        )

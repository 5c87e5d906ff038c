"""Schedulers that multiply settings of parameter groups by factors of the step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ptacc.errors import OptionError
from ptacc.types.progress import RunPlan
from ptacc.types.protocols import StateDict
from ptacc.validation import list_some

Factor: TypeAlias = Callable[[int], float]
"""From the number of completed steps to a factor."""


@dataclass(frozen=True)
class FactorSchedule:
    """Creates schedulers that multiply a setting of parameter groups by a factor: a value of `create_scheduler`.

    Args:
        make_factor: Returns the factor of a run from its plan.
        setting: The setting of the parameter groups, a number, such as `"lr"`, `"momentum"` or `"weight_decay"`.
        groups: The names of the parameter groups, which are their entries `"name"`; None for all groups.
    """

    make_factor: Callable[[RunPlan], Factor]
    setting: str = "lr"
    groups: Collection[str] | None = None

    def __call__(self, optimizer: Optimizer, plan: RunPlan) -> FactorScheduler:
        """Create the scheduler of a run."""
        return join_schedules(self)(optimizer, plan)


class FactorScheduler:
    """A scheduler that multiplies settings of parameter groups by factors of the step.

    Args:
        optimizer: The optimizer.
        factors: For each parameter group, the factors of its settings by name.
    """

    interval: ClassVar[str] = "step"
    """Its length is in steps, so it cannot step once an epoch."""

    def __init__(self, optimizer: Optimizer, factors: Sequence[Mapping[str, Factor]]) -> None:
        self.optimizer: Optimizer = optimizer
        self._factors = factors
        groups = optimizer.param_groups
        self._initial: list[dict[str, float]] = [
            {name: float(group[name]) for name in of_group} for of_group, group in zip(factors, groups, strict=True)
        ]
        self._steps = 0
        self._apply()

    def step(self) -> None:
        """Set the settings for the next step of the optimizer."""
        self._steps += 1
        self._apply()

    def get_last_lr(self) -> list[float]:
        """Return the learning rates of the parameter groups."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> StateDict:
        """Return the number of steps, and the settings at the start."""
        return {"steps": self._steps, "initial": self._initial}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state."""
        self._steps, self._initial = state_dict["steps"], list(state_dict["initial"])
        self._apply()

    def _apply(self) -> None:
        for group, factors, initial in zip(self.optimizer.param_groups, self._factors, self._initial, strict=True):
            for name, factor in factors.items():
                set_number(group, name, initial[name] * factor(self._steps))


def set_number(group: dict[str, Any], name: str, value: float) -> None:
    """Set a setting of a parameter group; a tensor is changed in place, since compiled optimizers hold it."""
    if isinstance(group[name], Tensor):
        with torch.no_grad():
            group[name].fill_(value)
    else:
        group[name] = value


def join_schedules(*schedules: FactorSchedule) -> Callable[[Optimizer, RunPlan], FactorScheduler]:
    """Join schedules of several settings or parameter groups. For the same setting of a group, the last one applies.

    Raises:
        OptionError: When the run starts: a parameter group has no such name, or a group lacks the setting.
    """

    def create(optimizer: Optimizer, plan: RunPlan) -> FactorScheduler:
        factors: list[dict[str, Factor]] = [{} for _ in optimizer.param_groups]
        for schedule in schedules:
            factor, names = schedule.make_factor(plan), [group.get("name") for group in optimizer.param_groups]
            if unknown := [name for name in schedule.groups or () if name not in names]:
                raise OptionError(
                    f"The schedule is for the parameter group {unknown[0]!r}, and the optimizer has the groups "
                    f"{list_some([str(name) for name in names])}. Name a group by its entry 'name'."
                )
            for group, name, of_group in zip(optimizer.param_groups, names, factors, strict=True):
                if schedule.groups is None or name in schedule.groups:
                    check_setting(group, schedule.setting)
                    of_group[schedule.setting] = factor
        return FactorScheduler(optimizer, factors)

    return create


def check_setting(group: Mapping[str, object], setting: str) -> None:
    """Raise `OptionError` for a setting that is missing or not a number."""
    if not isinstance(group.get(setting), int | float | Tensor):
        known = [name for name, value in group.items() if isinstance(value, float | Tensor)]
        raise OptionError(
            f"The schedule is of {setting!r}, and a parameter group has no such number. It has {', '.join(known)}."
        )

"""How many batches a step accumulates, which may change in the course of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import TypeAlias

from typing_extensions import override

from ptacc.errors import OptionError
from ptacc.types.progress import Epochs, Progress, RunPlan, Steps
from ptacc.validation import check_at_least

AccumulationOption: TypeAlias = Mapping[Epochs, int] | Mapping[Steps, int] | None
"""Batches per step from a number of complete epochs or steps on."""


@dataclass(frozen=True, slots=True)
class AccumulationSchedule:
    """The number of batches that each rank accumulates for a step, which may change in the course of a run.

    Skipped steps count like others here, so that the planned length of a run does not depend on them.

    Args:
        first: Batches per step at the start of a run.
        later: Batches per step from a number of complete steps or epochs on, in ascending order.
        by_step: Whether the keys of `later` are steps. By default they are epochs.

    Example:
        >>> from ptacc import Progress
        >>> schedule = AccumulationSchedule(1, {3: 4}, by_step=True)
        >>> schedule.count_steps(Progress(), batches=10)
        5
    """

    first: int
    later: Mapping[int, int]
    by_step: bool = False

    @classmethod
    def read(cls, owner: str, steps: int, schedule: AccumulationOption) -> AccumulationSchedule:
        """Return the schedule of the options of `GradAccumMixin`.

        Raises:
            OptionError: A number of batches is below 1, or the keys do not ascend, or are of two kinds.
        """
        check_at_least(owner, "gradient_accumulation_steps", steps, 1, "Leave it out to step after every batch.")
        if schedule is None:
            return cls(steps, {})
        option: object = schedule
        kinds = {type(key) for key in option} if isinstance(option, Mapping) else set[type]()
        given = f"{owner}(accumulation_schedule={schedule!r})"
        if kinds not in ({Epochs}, {Steps}):
            raise OptionError(
                f"{given}: must map Epochs or Steps to batches per step: {{Epochs(3): 4}} is 4 after 3 epochs."
            )
        later = {key.n: size for key, size in schedule.items()}
        for size in later.values():
            check_at_least(owner, "accumulation_schedule", size, 1, "It is a number of batches per step.")
        if list(later) != sorted(later):
            raise OptionError(f"{given}: the keys must ascend, in the order in which a run reaches them.")
        return cls(steps, later, by_step=kinds == {Steps})

    @override
    def __str__(self) -> str:
        return f"{self.first}" + "".join(f", {size} after {self.describe(key)}" for key, size in self.later.items())

    def describe(self, key: int) -> str:
        """Describe a key of `later`.

        Example:
            >>> AccumulationSchedule(1, {3: 4}).describe(3)
            '3 epochs'
        """
        return f"{key} {'step' if self.by_step else 'epoch'}{'s' if key > 1 else ''}"

    @property
    def largest(self) -> int:
        """The largest number of batches."""
        return max(self.first, *self.later.values()) if self.later else self.first

    def sizes_from(self, progress: Progress) -> Iterator[int]:
        """Iterate over the batches of the next steps of the epoch, without an end."""
        parts = self._parts(progress)
        return chain.from_iterable(repeat(size) if steps is None else repeat(size, steps) for size, steps in parts)

    def count_steps(self, progress: Progress, batches: int) -> int:
        """Return the steps that the next batches of the epoch make. The last step may have fewer batches."""
        total = 0
        for size, steps in self._parts(progress):
            made = -(-batches // size) if steps is None else min(-(-batches // size), steps)
            total, batches = total + made, max(batches - made * size, 0)
        return total

    def _parts(self, progress: Progress) -> Iterator[tuple[int, int | None]]:
        """Yield the batches per step from here on, each with the number of steps; None for the rest of the epoch."""
        now, size = self._now(progress), self.first
        for key, next_size in self.later.items():
            if now < key and not self.by_step:
                break
            if now < key:
                yield size, key - now
                now = key
            size = next_size
        yield size, None

    def _now(self, progress: Progress) -> int:
        return progress.steps + progress.skipped if self.by_step else progress.epochs

    def revise(self, plan: RunPlan, progress: Progress, batches_left: int, batches_per_epoch: int) -> RunPlan:
        """Return the plan of a run with the same limits, from its present progress on.

        Args:
            plan: The plan, which has the limits.
            progress: The progress of the run.
            batches_left: Batches left in the current epoch, or in the next one between two epochs.
            batches_per_epoch: Batches of each later epoch.

        Example:
            >>> plan = RunPlan.compute(num_epochs=5, steps_per_epoch=None, max_steps=None)
            >>> AccumulationSchedule(1, {3: 4}).revise(plan, Progress(), 10, 10).total_steps
            36
        """
        left = self.count_steps(progress, batches_left)
        while self._changes_after(progress) and batches_per_epoch and not plan.ends_within(progress, left):
            progress = replace(progress, steps=progress.steps + left, epochs=progress.epochs + 1)
            left = self.count_steps(progress, batches_per_epoch)
        revised = plan.revise(progress, left, self.count_steps(progress, batches_per_epoch))
        return replace(revised, known_steps_per_epoch=None) if self.later else revised

    def _changes_after(self, progress: Progress) -> bool:
        return bool(self.later) and self._now(progress) < max(self.later)


def as_accumulation(value: int | AccumulationSchedule) -> AccumulationSchedule:
    """Return the schedule of a number of batches that does not change."""
    return value if isinstance(value, AccumulationSchedule) else AccumulationSchedule(value, {})

"""Progress of a run, its planned length, and cadences such as `Steps(100)`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

from ptacc.errors import OptionError
from ptacc.validation import check_at_least, check_positive

# ---- progress and plan


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run. Every count is of completed things.

    Args:
        steps: Optimizer updates.
        epochs: Complete passes over the data.
        batches: Batches of the current epoch that were trained on, per process.
        offset: Position in the epoch's data: samples used by all processes together, or batches of a loader or stream.
        items: Items trained on, over all processes.
        seconds: Time since the run started, measured by this process at the end of the last step.
        skipped: Steps that were not made: a gradient scaler skipped the update, or `collate_fn` returned None for all
            batches. Not included in `steps`.
    """

    steps: int = 0
    epochs: int = 0
    batches: int = 0
    offset: int = 0
    items: float = 0
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The planned length of a run in optimizer steps.

    It is revised when an epoch begins whose number of batches differs from the planned one.

    `num_epochs`, `steps_per_epoch` and `total_steps` raise an `OptionError` if the number is unknown, as for a stream
    without a length. The arguments are None in that case.

    Args:
        known_epochs: Number of epochs.
        known_steps_per_epoch: Steps of one epoch.
        known_total_steps: Steps of the run.
        epoch_limit: Largest number of epochs, as given to `train`. `known_epochs` may be exceeded: steps that a
            gradient scaler skips do not count, so that the same number of steps takes more epochs.
        step_limit: Largest number of steps, as given to `train`.
        item_limit: Number of items after which the run ends, as given to `train`. The other numbers leave it out, since
            the number of items is known step by step only.

    Example:
        >>> plan = RunPlan.compute(num_epochs=3, steps_per_epoch=10, max_steps=25)
        >>> plan.total_steps
        25
    """

    known_epochs: int | None = None
    known_steps_per_epoch: int | None = None
    known_total_steps: int | None = None
    epoch_limit: int | None = None
    step_limit: int | None = None
    item_limit: float | None = None

    @classmethod
    def compute(
        cls,
        num_epochs: int | None,
        steps_per_epoch: int | None,
        max_steps: int | None,
        max_items: float | None = None,
    ) -> RunPlan:
        """Compute the plan of a run that ends at the first of its limits. None means no limit, or an unknown one."""
        plan = cls(num_epochs, None, max_steps, epoch_limit=num_epochs, step_limit=max_steps, item_limit=max_items)
        return plan if steps_per_epoch is None else plan.revise(Progress(), steps_per_epoch, steps_per_epoch)

    def revise(self, progress: Progress, steps_left: int, steps_per_epoch: int) -> RunPlan:
        """Return the plan of a run with the same limits, from its present progress on.

        Args:
            progress: The progress of the run.
            steps_left: Steps left in the current epoch, or in the next one between two epochs.
            steps_per_epoch: Steps of each later epoch.

        Example:
            >>> plan = RunPlan.compute(num_epochs=3, steps_per_epoch=5, max_steps=None)
            >>> plan.revise(Progress(steps=6, epochs=1), steps_left=8, steps_per_epoch=8).total_steps
            22
        """
        at_end = progress.steps + progress.skipped + steps_left
        limits = [] if self.step_limit is None else [self.step_limit]
        if self.epoch_limit is not None:
            limits.append(at_end + (self.epoch_limit - progress.epochs - 1) * steps_per_epoch)
        total, epochs = min(limits) if limits else None, self.epoch_limit
        if total is not None and steps_per_epoch:
            epochs_needed = progress.epochs + 1 + math.ceil(max(total - at_end, 0) / steps_per_epoch)
            epochs = epochs_needed if epochs is None else min(epochs, epochs_needed)
        return replace(self, known_epochs=epochs, known_steps_per_epoch=steps_per_epoch, known_total_steps=total)

    def is_complete(self, progress: Progress) -> bool:
        """Return whether the run has reached one of its limits.

        Example:
            >>> RunPlan.compute(num_epochs=3, steps_per_epoch=10, max_steps=25).is_complete(Progress(steps=25))
            True
        """
        if self.step_limit is not None and progress.steps >= self.step_limit:
            return True
        if self.item_limit is not None and progress.items >= self.item_limit:
            return True
        return self.epoch_limit is not None and progress.epochs >= self.epoch_limit

    def ends_within(self, progress: Progress, steps: int) -> bool:
        """Return whether the run ends within the next steps, or has had all its epochs."""
        if self.epoch_limit is not None and progress.epochs >= self.epoch_limit:
            return True
        return self.step_limit is not None and progress.steps + progress.skipped + steps >= self.step_limit

    @property
    def num_epochs(self) -> int:
        """Epochs of the run, including a partial one at the end."""
        return self._known(self.known_epochs, "num_epochs")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch. Unknown if the number of batches per step changes."""
        return self._known(self.known_steps_per_epoch, "steps_per_epoch")

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the run."""
        return self._known(self.known_total_steps, "total_steps")

    def _known(self, value: int | None, name: str) -> int:
        if value is None:
            raise OptionError(
                f"RunPlan.{name}: not known for this run. Its data has no length, or it accumulates another number of "
                "batches from some step on. Give max_steps to train(), and size the schedule by plan.total_steps."
            )
        return value


# ---- cadences, for evaluating, saving and logging


@dataclass(frozen=True, slots=True)
class Steps:
    """Every `n` optimizer steps."""

    n: int

    def __post_init__(self) -> None:
        check_at_least("Steps", "n", self.n, 1)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Return whether something is due at `now` that was last done at `last`."""
        return now.steps > last.steps and now.steps % self.n == 0

    def is_reached(self, now: Progress) -> bool:
        """Return whether `n` steps are complete."""
        return now.steps >= self.n


@dataclass(frozen=True, slots=True)
class Epochs:
    """Every `n` epochs, at the end of the epoch."""

    n: int

    def __post_init__(self) -> None:
        check_at_least("Epochs", "n", self.n, 1)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Return whether something is due at `now` that was last done at `last`."""
        return now.epochs > last.epochs and now.epochs % self.n == 0

    def is_reached(self, now: Progress) -> bool:
        """Return whether `n` epochs are complete."""
        return now.epochs >= self.n


@dataclass(frozen=True, slots=True)
class Minutes:
    """Every `n` minutes by the clock of rank 0, at the end of a step or an epoch."""

    n: float

    def __post_init__(self) -> None:
        check_positive("Minutes", "n", self.n)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Return whether something is due at `now` that was last done at `last`."""
        return now.seconds - last.seconds >= 60 * self.n


@dataclass(frozen=True, slots=True)
class Items:
    """Every `n` items that the run has trained on, over all processes, at the end of the step that reaches them.

    Items are what `count_items` counts: by default the samples, or the tokens whose target the loss does not ignore.
    """

    n: float

    def __post_init__(self) -> None:
        check_positive("Items", "n", self.n)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Return whether something is due at `now` that was last done at `last`.

        Example:
            >>> [Items(20).is_due(Progress(items=n), last=Progress(items=n - 8)) for n in (8, 16, 24, 32, 40)]
            [False, False, True, False, True]
        """
        return now.items // self.n > last.items // self.n


Cadence: TypeAlias = Steps | Epochs | Minutes | Items

"""Progress of a run, its plan, and cadences: how often something is due."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from ptacc.errors import OptionError
from ptacc.validation import check_at_least, check_positive

# ---- how far a run is, and how long it will be


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Every count is of completed things.

    Args:
        steps: Optimizer updates that happened.
        epochs: Whole passes over the data.
        batches: Batches of the current epoch that were trained on, per process.
        offset: Where the processes are in the epoch's data: samples that they took together, or batches of a loader.
        items: Items trained on, over all processes.
        seconds: Time since the run started, as this process sees it at the end of the last step.
    """

    steps: int = 0
    epochs: int = 0
    batches: int = 0
    offset: int = 0
    items: float = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The length of a run in optimizer steps, the same for any number of processes.

    Args:
        known_epochs: Number of epochs, where it is known.
        known_steps_per_epoch: Steps of one epoch, where it is known.
        known_total_steps: Steps of the whole run, where it is known.
        epoch_limit: Epochs at most, where the run was given a limit. Steps that a gradient scaler skips count
            nowhere, so that as many steps may take more epochs than were planned.

    A length that nobody can know (a stream has no epochs' ends to plan with) raises when it is asked for, so that a
    schedule never gets a made-up number.

    Example:
        >>> plan = RunPlan.compute(num_epochs=3, steps_per_epoch=10, max_steps=25)
        >>> plan.total_steps
        25
    """

    known_epochs: int | None = None
    known_steps_per_epoch: int | None = None
    known_total_steps: int | None = None
    epoch_limit: int | None = None

    @classmethod
    def compute(cls, num_epochs: int | None, steps_per_epoch: int | None, max_steps: int | None) -> RunPlan:
        """Work the plan out from what is known: whichever of `num_epochs` and `max_steps` comes first."""
        limits = [max_steps] if max_steps is not None else []
        if num_epochs is not None and steps_per_epoch is not None:
            limits.append(num_epochs * steps_per_epoch)
        total, epoch_limit = min(limits) if limits else None, num_epochs
        if total is not None and steps_per_epoch:
            epochs_needed = math.ceil(total / steps_per_epoch)
            num_epochs = epochs_needed if num_epochs is None else min(num_epochs, epochs_needed)
        return cls(num_epochs, steps_per_epoch, total, epoch_limit)

    @property
    def num_epochs(self) -> int:
        """Epochs of the run, a last partial one included."""
        return self._known(self.known_epochs, "num_epochs")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self._known(self.known_steps_per_epoch, "steps_per_epoch")

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self._known(self.known_total_steps, "total_steps")

    def _known(self, value: int | None, name: str) -> int:
        if value is None:
            raise OptionError(
                f"RunPlan.{name}: not known for this run, whose data has no length. "
                "Give max_steps to train(), and size the schedule by plan.total_steps."
            )
        return value


# ---- cadences: the same for evaluating, saving, logging


@dataclass(frozen=True, slots=True)
class Steps:
    """Every `n` optimizer steps."""

    n: int

    def __post_init__(self) -> None:
        check_at_least("Steps", "n", self.n, 1)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Say whether this is due at `now`, when it was last done at `last`."""
        return now.steps > last.steps and now.steps % self.n == 0


@dataclass(frozen=True, slots=True)
class Epochs:
    """Every `n` epochs, at their end."""

    n: int

    def __post_init__(self) -> None:
        check_at_least("Epochs", "n", self.n, 1)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Say whether this is due at `now`, when it was last done at `last`."""
        return now.epochs > last.epochs and now.epochs % self.n == 0


@dataclass(frozen=True, slots=True)
class Minutes:
    """Every `n` minutes, at the first step or epoch end after that, by the clock of rank 0."""

    n: float

    def __post_init__(self) -> None:
        check_positive("Minutes", "n", self.n)

    def is_due(self, now: Progress, last: Progress) -> bool:
        """Say whether this is due at `now`, when it was last done at `last`."""
        return now.seconds - last.seconds >= 60 * self.n


Cadence: TypeAlias = Steps | Epochs | Minutes

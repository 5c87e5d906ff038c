"""`Tracker`: what receives the configuration and the values of a run, such as TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

ConfigValue: TypeAlias = bool | int | float | str


@dataclass(frozen=True)
class TrackedRun:
    """A run of a tracker, as a checkpoint knows it.

    A resumed run logs the values after its checkpoint again, equal to those that the tracker may already have.

    Args:
        id: What `Tracker.start` returned.
        reports: Number of calls of `Tracker.log` before the checkpoint.
        step: Step of the last of these calls; -1 if there was none.
    """

    id: str
    reports: int = 0
    step: int = -1


@runtime_checkable
class Tracker(Protocol):
    """Receives the configuration and the values of runs, on rank 0. One object tracks several runs in turn.

    If a method raises an exception, the tracker is left out of the rest of the run, with a warning.
    """

    @property
    def name(self) -> str:
        """What distinguishes this tracker from the others of a trainer, also in a checkpoint."""
        ...

    def start(self, config: Mapping[str, ConfigValue], resume: TrackedRun | None) -> str:
        """Start a run of the tracker, or continue one.

        A continued run either removes what was logged after `resume.reports` calls of `log`, or has a `last_step`: see
        `HasLastStep`.

        Args:
            config: The options, classes and launch of the run, by name.
            resume: The run of the tracker to continue; None for a new one.

        Returns:
            The id of the tracker's run, which checkpoints contain.
        """
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a report.

        Args:
            values: Values by name. They may be NaN or infinite.
            step: Optimizer steps completed. It never decreases.
        """
        ...

    def finish(self, exit_code: int) -> None:
        """End the run of the tracker.

        Args:
            exit_code: 0 if the run is complete or was stopped, 128 plus the signal's number if a signal ended it, and 1
                after an exception.
        """
        ...


@runtime_checkable
class HasLastStep(Protocol):
    """A tracker that cannot remove values, or loses some when the process is killed.

    When it continues a run, values up to `last_step` are not logged again, and those that it lacks are.
    """

    @property
    def last_step(self) -> int:
        """Step of the last values that the continued run has; -1 if it has none."""
        ...


@runtime_checkable
class TracksImages(Protocol):
    """A tracker that has images, too."""

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Log an image.

        Args:
            name: Name of the image.
            image: `(height, width, 3)`.
            step: Optimizer steps completed.
        """
        ...

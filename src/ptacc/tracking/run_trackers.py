"""The trackers of one run."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, fields, replace

import numpy as np
from numpy.typing import NDArray

from ptacc.core.hooks import TrainerCore
from ptacc.errors import NoRunError, OptionError
from ptacc.loop.explain import class_rows, launch_rows, shorten
from ptacc.run.history import RunHistory
from ptacc.run.run import Run
from ptacc.run.state import StateKey
from ptacc.tracking.accelerate import AccelerateTracker
from ptacc.tracking.images import ImageLike, to_image
from ptacc.tracking.tracker import ConfigValue, HasLastStep, TrackedRun, Tracker, TracksImages
from ptacc.types.protocols import StateDict

INTERRUPTED = 130
"""Exit code of a process that was interrupted from the keyboard."""


class RunTrackers:
    """Starts the trackers of a run, passes values on to them, and leaves out those that fail.

    Its state has the run of each tracker, by the tracker's name.

    Args:
        trackers: The trackers. Ranks other than 0 have none.
        config: What the trackers store about the run.
        history: The history of the run, which has the values before a checkpoint.
    """

    def __init__(self, trackers: Sequence[Tracker], config: Mapping[str, ConfigValue], history: RunHistory) -> None:
        self._config, self._history = config, history
        self._not_started: Sequence[Tracker] = trackers
        self._active: tuple[Tracker, ...] = ()
        self._runs: dict[str, TrackedRun] = {}
        self._last_steps: dict[str, int] = {}

    def start(self) -> None:
        """Start the trackers, or continue their runs, unless that has been done."""
        new, self._not_started = self._not_started, ()
        for tracker in new:
            with self._left_out_if_it_fails(tracker):
                saved = self._runs.get(tracker.name)
                run_id = tracker.start(self._config, saved)
                self._runs[tracker.name] = TrackedRun(run_id) if saved is None else replace(saved, id=run_id)
                self._active = (*self._active, tracker)
                if saved is not None and isinstance(tracker, HasLastStep):
                    self._last_steps[tracker.name] = tracker.last_step
                    for record in self._history.values:
                        if tracker.last_step < record.step <= saved.step:  # lost when the process was killed
                            tracker.log(record.values, record.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the values of a report."""
        self.start()
        for tracker in self._active:
            with self._left_out_if_it_fails(tracker):
                if step > self._last_steps.get(tracker.name, -1):
                    tracker.log(values, step)
                run = self._runs[tracker.name]
                self._runs[tracker.name] = replace(run, reports=run.reports + 1, step=step)

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Log an image to those trackers that have images."""
        self.start()
        for tracker in self._active:
            if isinstance(tracker, TracksImages):
                with self._left_out_if_it_fails(tracker):
                    tracker.log_image(name, image, step)

    def finish(self, exit_code: int) -> None:
        """End the runs of the trackers."""
        for tracker in self._active:
            with self._left_out_if_it_fails(tracker):
                tracker.finish(exit_code)
        self._active = self._not_started = ()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, tracker: Tracker) -> Generator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  # packages raise errors of their own, and of the network
            self._active = tuple(other for other in self._active if other is not tracker)
            warnings.warn(
                f"The tracker {tracker.name!r} failed, and the run continues without it: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )

    def state_dict(self) -> StateDict:
        """Return the run of each tracker, by the tracker's name."""
        return {name: asdict(run) for name, run in self._runs.items()}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load the runs that `start` continues. Those that it has started already are kept."""
        self._runs = {name: TrackedRun(**run) for name, run in state_dict.items()} | self._runs


TRACKERS: StateKey[RunTrackers] = StateKey("trackers")


@contextlib.contextmanager
def finishing_trackers(run: Run) -> Generator[None]:
    """End the runs of the trackers after the block, with the exit code of the process."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
        raise
    finally:
        if TRACKERS in run:
            run[TRACKERS].finish(run.stopping.exit_code or exit_code)


def collect_config(trainer: TrainerCore) -> dict[str, ConfigValue]:
    """Return the classes, the launch, the options, the arguments of `train()` and the settings of the optimizers."""
    run, options = trainer.run, [option for option in fields(trainer) if option.init]
    return {
        "classes": " > ".join(name for name, _ in class_rows(type(trainer))),
        **{name: value for name, value, _ in launch_rows(trainer)},
        **{option.name: plain(getattr(trainer, option.name)) if option.repr else "(hidden)" for option in options},
        **{name: plain(value) for name, value in run.options.items()},
        "seed": run.seed,
        **{
            f"{slot.name}.{name}": value
            for slot in trainer.optimizer_slots()
            for name, value in slot.optimizer.defaults.items()
            if isinstance(value, bool | int | float | str)
        },
    }


def plain(value: object) -> ConfigValue:
    """Return a number, a bool or a string as it is, a path as a string, and a short text for any other value."""
    if isinstance(value, os.PathLike):
        return str(value)
    return value if isinstance(value, bool | int | float | str) else shorten(value)


def make_run_trackers(trainer: TrainerCore, trackers: Sequence[Tracker | str]) -> RunTrackers:
    """Create the trackers of the run that begins: none on ranks other than 0, and in copies made by searches.

    Those of a new run are started. Those of a resumed run need their state first, so the first report starts them.
    """
    tracks = trainer.distributed.is_main and not trainer.is_isolated
    own = [tracker for tracker in trackers if tracks and not isinstance(tracker, str)]
    made = RunTrackers(own, collect_config(trainer) if own else {}, trainer.history)
    if trainer.run.resume_state is None:
        made.start()
    return made


def log_image(trainer: TrainerCore, name: str, image: ImageLike) -> None:
    """Log an image or a figure at the present step, to the trackers that have images.

    Call it in any hook or callback. Ranks other than 0 do nothing.

    Args:
        trainer: The trainer: this is a method of `TrackingMixin`.
        name: Name of the image.
        image: A matplotlib figure; or an array or tensor `(height, width)` or `(height, width, 3)` of bytes, or of
            floats from 0 to 1.

    Raises:
        NoRunError: No run is in progress.
        OptionError: The array has another shape or dtype.
    """
    if not trainer.is_running:
        owner = type(trainer).__name__
        raise NoRunError(f"{owner}.log_image() was called outside of a run. Call it in a hook or callback.")
    if trainer.distributed.is_main:
        trainer.run[TRACKERS].log_image(name, to_image(name, image), trainer.progress.steps)


def check_trackers(owner: str, trackers: Sequence[Tracker | str]) -> list[Tracker]:
    """Return the trackers, with an `AccelerateTracker` for the name of a package.

    Raises:
        OptionError: A name is unknown, its package is not installed, a value is not a tracker, or two trackers have the
            same name.
    """
    if isinstance(trackers, str) or not isinstance(trackers, Sequence):
        raise OptionError(f"{owner}(trackers={trackers!r}): must be a list, such as ['tensorboard'].")
    made = [AccelerateTracker(tracker) if isinstance(tracker, str) else tracker for tracker in trackers]
    for tracker in made:
        if not isinstance(tracker, Tracker):
            raise OptionError(
                f"{owner}(trackers=...): {tracker!r} is not a tracker. Give the name of a package, such as "
                "'tensorboard', or an object with the methods of ptacc.protocols.Tracker."
            )
    names = [tracker.name for tracker in made]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"{owner}(trackers=...): two trackers have the name {repeated[0]!r}. Give each its own.")
    return made

"""`AccelerateTracker`: the trackers that Accelerate wraps, such as TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from numpy.typing import NDArray

from ptacc.errors import OptionError
from ptacc.tracking.files import create_unused
from ptacc.tracking.packages import PACKAGES
from ptacc.tracking.tracker import ConfigValue, TrackedRun
from ptacc.validation import absolute_path, did_you_mean


class AccelerateTracker:
    """Tracks runs with a package that Accelerate has a tracker for.

    Args:
        package: `"tensorboard"`, `"wandb"`, `"mlflow"`, `"trackio"`, `"aim"`, `"swanlab"`, `"comet_ml"`, `"clearml"` or
            `"dvclive"`. It has to be installed.
        project: The project or experiment that the runs belong to.
        directory: Directory for the files of TensorBoard and Aim. Those of TensorBoard are in its subdirectory
            `project`, and those of later runs in `project-run-2` and so on.
        init_kwargs: Further arguments of the package's own function or class that starts a run, such as `wandb.init`.

    Raises:
        OptionError: The package is unknown or is not installed, or the directory is not a local path.
    """

    def __init__(
        self, package: str, *, project: str = "ptacc", directory: str | os.PathLike[str] = "runs", **init_kwargs: Any
    ) -> None:
        if package not in PACKAGES:
            known = ", ".join(map(repr, PACKAGES))
            raise OptionError(f"{package!r} is not a tracker. {did_you_mean(package, PACKAGES)}Give one of {known}.")
        if package not in {str(name) for name in get_available_trackers()}:
            raise OptionError(f"The tracker {package!r} needs a package: pip install {package.replace('_', '-')}.")
        self._name, self._project, self._init_kwargs = package, project, init_kwargs
        self._directory = absolute_path("AccelerateTracker", "directory", directory)
        self._package = PACKAGES[package]
        self._tracker_class: Callable[..., GeneralTracker] = LOGGER_TYPE_TO_CLASS[package]
        self._tracker: GeneralTracker | None = None
        self._last_step = -1

    @property
    def name(self) -> str:
        """The name of the package."""
        return self._name

    @property
    def tracker(self) -> Any:
        """The package's own object: a `SummaryWriter`, a `wandb.Run`, ...; None before the first run."""
        return None if self._tracker is None else self._tracker.tracker

    @property
    def last_step(self) -> int:
        """Step of the last values that the continued run had when it was started; -1 for a new run."""
        return self._last_step

    def start(self, config: Mapping[str, ConfigValue], resume: TrackedRun | None) -> str:
        """Start a run, or continue one by its id."""
        keywords = self._init_kwargs | ({} if resume is None else self._package.resume(resume))
        project = self._project
        if self._package.run_is_directory:
            unused = self._directory / project
            project = create_unused(unused, is_directory=True).name if resume is None else resume.id
        arguments = (project, self._directory) if self._package.takes_directory else (project,)
        self._tracker = tracker = self._tracker_class(*arguments, **keywords)
        tracker.start()
        if resume is None:
            tracker.store_init_configuration(dict(config))
        self._last_step = -1 if resume is None else self._package.find_last_step(self.tracker, resume)
        return self._package.get_id(self.tracker)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values."""
        assert self._tracker is not None
        self._tracker.log(dict(values), **self._package.log_arguments(self.tracker, step))

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Log an image, if the package can."""
        if self._package.log_image is not None:
            self._package.log_image(self.tracker, name, image, step)

    def finish(self, exit_code: int) -> None:
        """End the run, with its status if the package has one."""
        assert self._tracker is not None
        if self._package.finish is None:
            self._tracker.finish()
        else:
            self._package.finish(self.tracker, exit_code)

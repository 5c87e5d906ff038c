"""How each package that Accelerate's trackers wrap identifies a run, continues it, and ends it."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptacc.tracking.tracker import TrackedRun

SIGNALLED = 128
"""Exit codes above this one are of processes that a signal ended."""


@dataclass(frozen=True)
class Package:
    """A package with a tracker class in Accelerate.

    Args:
        get_id: Returns the id of the package's run object.
        resume: Returns the arguments with which the run of an id is continued.
        find_last_step: Returns the step of the last values that a continued run has. By default, that of the last ones
            before the checkpoint: the package has those, and replaces later ones.
        finish: Ends the package's run object with an exit code. By default, the tracker's own `finish` is called.
        log_image: Logs an image `(height, width, 3)` to the package's run object; None if it cannot.
        log_arguments: Returns arguments of the tracker's `log`, of the package's run object and a step.
        takes_directory: Whether the second argument of the tracker's class is a directory.
        run_is_directory: Whether a run is a subdirectory, named by the first argument of the tracker's class.
    """

    get_id: Callable[[Any], str]
    resume: Callable[[TrackedRun], dict[str, Any]]
    find_last_step: Callable[[Any, TrackedRun], int] = lambda _, resume: resume.step
    finish: Callable[[Any, int], object] | None = None
    log_image: Callable[[Any, str, NDArray[np.uint8], int], object] | None = None
    log_arguments: Callable[[Any, int], dict[str, Any]] = lambda _, step: {"step": step}
    takes_directory: bool = False
    run_is_directory: bool = False


# ---- TensorBoard


def log_tensorboard_image(run: Any, name: str, image: NDArray[np.uint8], step: int) -> None:
    """Log an image to a `SummaryWriter`."""
    run.add_image(name, image, global_step=step, dataformats="HWC")
    run.flush()


# ---- Weights & Biases


def find_last_wandb_step(run: Any, _: TrackedRun) -> int:
    """Return the last step on the server, or offline in the files of this machine.

    A killed process loses up to 15 seconds of values, which Weights & Biases keeps in memory.
    """
    if not run.offline:
        return int(run.step) - 1
    files = Path(run.settings.wandb_dir).glob(f"offline-run-*-{run.id}/run-{run.id}.wandb")
    return max((step for file in files for step in read_offline_steps(file)), default=-1)


def read_offline_steps(file: Path) -> Iterator[int]:
    """Yield the steps in a file of an offline run.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # defines its classes when it is run
    content, position, message = file.read_bytes(), 7, b""  # after the file's header
    while position + 7 <= len(content):
        if (left := 32_768 - position % 32_768) < 7:  # blocks are padded
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record, message = messages.Record.FromString(message), b""
            if record.HasField("history"):
                yield record.history.step.num


def log_wandb_image(run: Any, name: str, image: NDArray[np.uint8], step: int) -> None:
    """Log an image, with the next row of values if those of this step are logged already."""
    import wandb

    run.log({name: wandb.Image(image)}, step=max(step, run.step))


# ---- MLflow


def find_last_mlflow_step(run: Any, _: TrackedRun) -> int:
    """Return the last step of the value that every report has."""
    import mlflow

    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "epoch")
    return max((metric.step for metric in history), default=-1)


def finish_mlflow(_: object, exit_code: int) -> None:
    """End the active run with a status."""
    import mlflow

    mlflow.end_run("FINISHED" if exit_code == 0 else "KILLED" if exit_code > SIGNALLED else "FAILED")


def log_mlflow_image(_: object, name: str, image: NDArray[np.uint8], step: int) -> None:
    """Log an image to the active run."""
    import mlflow

    mlflow.log_image(image, key=name, step=step)


# ---- trackio


def log_trackio_image(run: Any, name: str, image: NDArray[np.uint8], step: int) -> None:
    """Log an image."""
    import trackio

    run.log({name: trackio.Image(image)}, step=step)


PACKAGES: Mapping[str, Package] = {
    "tensorboard": Package(
        get_id=lambda run: Path(run.log_dir).name,
        resume=lambda resume: {"purge_step": resume.step + 1},
        log_image=log_tensorboard_image,
        takes_directory=True,
        run_is_directory=True,
    ),
    "wandb": Package(
        get_id=attrgetter("id"),
        resume=lambda resume: {"id": resume.id, "resume": "allow"},
        find_last_step=find_last_wandb_step,
        finish=lambda run, exit_code: run.finish(exit_code),
        log_image=log_wandb_image,
        log_arguments=lambda run, step: {"step": max(step, run.step), "commit": True},  # shown at once
    ),
    "mlflow": Package(
        get_id=attrgetter("info.run_id"),
        resume=lambda resume: {"run_id": resume.id},
        find_last_step=find_last_mlflow_step,
        finish=finish_mlflow,
        log_image=log_mlflow_image,
    ),
    "trackio": Package(
        get_id=attrgetter("name"),
        resume=lambda resume: {"name": resume.id, "resume": "allow"},
        find_last_step=lambda run, _: int(vars(run)["_next_step"]) - 1,  # a killed process loses a second of values
        log_image=log_trackio_image,
    ),
    "aim": Package(get_id=attrgetter("hash"), resume=lambda resume: {"run_hash": resume.id}, takes_directory=True),
    "swanlab": Package(get_id=attrgetter("id"), resume=lambda resume: {"id": resume.id, "resume": "allow"}),
    "comet_ml": Package(get_id=attrgetter("id"), resume=lambda resume: {"experiment_key": resume.id, "mode": "get"}),
    "clearml": Package(get_id=attrgetter("id"), resume=lambda resume: {"continue_last_task": resume.id}),
    "dvclive": Package(
        get_id=attrgetter("dir"),
        resume=lambda resume: {"dir": resume.id, "resume": True},
        find_last_step=lambda run, _: int(run.read_latest().get("step", -1)),
    ),
}
"""The packages, by the names that Accelerate gives them."""

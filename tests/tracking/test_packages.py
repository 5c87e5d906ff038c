"""Every tracker that is installed holds each point once after a run was killed twice, on one and on two processes."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ptacc.protocols import Tracker
from ptacc.tracking import AccelerateTracker, CSVTracker, JSONLinesTracker
from tests.ranks import run_ranks
from tests.tracking.readers import (
    READERS,
    Points,
    read_json_lines,
    read_mlflow_run,
    read_tensorboard_images,
    round_points,
)
from tests.tracking.tracked import IMAGE_AT, make_trainer, train, train_killed_twice

PACKAGES = ("tensorboard", "wandb", "mlflow", "trackio")
pytestmark = [pytest.mark.timeout(200), pytest.mark.filterwarnings("ignore")]  # warnings of the packages


def set_environment(directory: Path) -> None:
    """Keep all that the packages write in a directory. Some read the variables when they are imported."""
    os.environ |= {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_DIR": str(directory),
        "MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(directory / "trackio"),
    }


def make_trackers(directory: Path) -> list[Tracker | str]:
    """Make the trackers that need nothing, and those whose packages are installed."""
    set_environment(directory)
    keywords: dict[str, dict[str, Any]] = {"mlflow": {"logging_dir": str(directory / "artifacts")}}
    installed = [
        AccelerateTracker(name, directory=directory / name, **keywords.get(name, {}))
        for name in PACKAGES
        if find_spec(name)
    ]
    return [JSONLinesTracker(directory / "values.jsonl"), CSVTracker(directory / "values.csv"), *installed]


def read(name: str, directory: Path) -> list[Points]:
    set_environment(directory)
    return READERS[name](directory)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.prove)], ids=["1 process", "2 processes"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Points]:
    """Train with kills. Return the directory, and the points of the run without kills."""
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    world_size: int = request.param
    run_ranks(lambda: train(make_trainer(whole, [JSONLinesTracker(whole / "values.jsonl")])), world_size)
    train_killed_twice(killed, lambda: make_trackers(killed), world_size)
    return killed, read_json_lines(whole)[0]


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_was_killed_twice_has_each_point_once(name: str, run: tuple[Path, Points]) -> None:
    if name in PACKAGES and find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    directory, expected = run
    assert [step for step, _ in expected["eval_loss"]] == [10, 20, 30, 40, 50]
    found = run_ranks(read, 1, name, directory)[0]
    assert len(found) == 1
    assert found[0] == (round_points(expected) if name == "tensorboard" else expected)


def test_an_image_is_read_back_once(run: tuple[Path, Points]) -> None:
    pytest.importorskip("tensorboard")
    assert run_ranks(read_tensorboard_images, 1, run[0]) == [[IMAGE_AT]]


def test_the_status_and_the_configuration_are_read_back(run: tuple[Path, Points]) -> None:
    if find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    ((status, parameters),) = run_ranks(read_mlflow_run, 1, run[0])
    assert status == "FINISHED"
    assert parameters > 20

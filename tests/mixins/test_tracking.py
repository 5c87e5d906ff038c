import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, StepResult, Steps, TrackingMixin, Trainer
from ptacc.core.hooks import TrainerCore
from ptacc.errors import NoRunError, OptionError
from ptacc.protocols import TrackedRun
from ptacc.testing import check_mixin, tiny_data, tiny_parts
from ptacc.tuning import find_learning_rate
from tests.ranks import run_ranks
from tests.tracking.recorder import Recorder


class Tracked(TrackingMixin, Trainer): ...


class Saved(TrackingMixin, CheckpointMixin, Trainer): ...


class Raises(Callback[TrainerCore]):
    """Raises an error after a step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @override
    def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
        if step.step == 4:
            raise self.error


def make_trainer(recorder: Recorder, **options: Any) -> Tracked:
    return Tracked(**tiny_parts(), trackers=[recorder], log_every=Steps(2), **options)


def test_it_keeps_the_laws_of_mixins() -> None:
    check_mixin(TrackingMixin)


def test_a_tracker_receives_the_values_of_the_run_by_step() -> None:
    recorder = Recorder()
    history = make_trainer(recorder).train(tiny_data(), tiny_data(), max_steps=5, evaluate_every=Steps(3))
    assert recorder.points == [(record.step, record.values) for record in history.values]
    assert {3, 5} < {*recorder.steps}
    assert recorder.exit_codes == [0]


def test_two_runs_of_a_trainer_are_two_runs_of_its_trackers() -> None:
    recorder = Recorder()
    trainer = make_trainer(recorder)
    for _ in range(2):
        trainer.train(tiny_data(), max_steps=2)
    assert (recorder.starts, recorder.steps, recorder.exit_codes) == ([None, None], [2, 2], [0, 0])


def test_the_configuration_has_options_classes_launch_and_settings() -> None:
    recorder = Recorder()
    make_trainer(recorder).train(tiny_data(), max_steps=2)
    expected = {"classes": "Tracked > TrackingMixin", "device": "cpu", "max_steps": 2, "log_every": "Steps(n=2)"}
    for name, value in {**expected, "optimizer.lr": 0.1, "callbacks": "[]"}.items():
        found = recorder.config[name]
        assert str(found).startswith(str(value))
        assert isinstance(found, bool | int | float | str)


def test_hidden_options_are_hidden(tmp_path: Path) -> None:
    recorder = Recorder()
    Saved(**tiny_parts(), trackers=[recorder], checkpoint_dir=tmp_path, checkpoint_key=b"secret").train(
        tiny_data(), max_steps=1
    )
    assert recorder.config["checkpoint_key"] == "(hidden)"


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(method: str) -> None:
    failing, other = Recorder(fails_in=method), Recorder()
    other.name = "other"
    trainer = Tracked(**tiny_parts(), trackers=[failing, other], log_every=Steps(1))
    with pytest.warns(UserWarning, match="The tracker 'recorder' failed.*ConnectionError: no network") as warned:
        trainer.train(tiny_data(), max_steps=3)
    assert len(warned) == 1
    assert other.steps == [1, 2, 3]


@pytest.mark.parametrize(("error", "exit_code"), [(ValueError("x"), 1), (KeyboardInterrupt(), 130)])
def test_trackers_are_finished_if_an_exception_ends_the_run(error: BaseException, exit_code: int) -> None:
    recorder = Recorder()
    trainer = make_trainer(recorder, callbacks=[Raises(error)])
    with pytest.raises(type(error)):
        trainer.train(tiny_data(), max_steps=8)
    assert recorder.exit_codes == [exit_code]


def test_trackers_are_finished_if_a_signal_ends_the_run() -> None:
    class Terminated(Raises):
        @override
        def on_step_end(self, trainer: TrainerCore, step: StepResult) -> None:
            if step.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    recorder = Recorder()
    trainer = make_trainer(recorder, callbacks=[Terminated(ValueError())])
    with pytest.raises(SystemExit):
        trainer.train(tiny_data(), num_epochs=50)
    assert recorder.exit_codes == [143]


def test_a_resumed_run_continues_the_run_of_its_tracker(tmp_path: Path) -> None:
    recorder = Recorder()
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "trackers": [recorder], "log_every": Steps(2)}
    Saved(**tiny_parts(), **options).train(tiny_data(), max_steps=4)
    Saved(**tiny_parts(), resume=True, **options).train(tiny_data(), max_steps=8)
    assert recorder.starts == [None, TrackedRun("run 1", reports=3, step=4)]
    assert recorder.steps == [2, 3, 4, 6, 8]


def test_rank_0_alone_has_trackers(tmp_path: Path) -> None:
    def worker() -> list[int]:
        recorder = Recorder()
        make_trainer(recorder).train(tiny_data(), max_steps=4)
        return recorder.steps

    first, second = run_ranks(worker, 2)
    assert first
    assert second == []


def test_a_search_tracks_nothing() -> None:
    recorder = Recorder()
    find_learning_rate(make_trainer(recorder), tiny_data(), steps=20)
    assert recorder.starts == []


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (["tensorbord"], r"'tensorbord' is not a tracker. Did you mean `tensorboard`\?"),
        ("tensorboard", r"trackers='tensorboard'\): must be a list"),
        ([print], "is not a tracker. Give the name of a package"),
        ([Recorder(), Recorder()], "two trackers have the name 'recorder'"),
    ],
)
def test_invalid_trackers_are_errors(trackers: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Tracked(**tiny_parts(), trackers=trackers)


def test_a_package_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(OptionError, match="needs a package: pip install comet-ml"):
        Tracked(**tiny_parts(), trackers=["comet_ml"])


# ---- images


class Gallery(Recorder):
    """A tracker that has images."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[tuple[str, Any, int]] = []

    def log_image(self, name: str, image: Any, step: int) -> None:
        self.images.append((name, image, step))


class Draws(Callback[TrackingMixin]):
    """Logs an image after a step."""

    def __init__(self, image: Any) -> None:
        self.image = image

    @override
    def on_step_end(self, trainer: TrackingMixin, step: StepResult) -> None:
        trainer.log_image("sample", self.image)


@pytest.mark.parametrize(
    "image", [torch.ones(4, 6), np.full((4, 6, 1), 255, np.uint8), torch.ones(4, 6, 3), Figure((0.06, 0.04))]
)
def test_images_and_figures_are_logged_as_bytes(image: Any) -> None:
    gallery = Gallery()
    trainer = Tracked(**tiny_parts(), trackers=[gallery, Recorder()][:1], callbacks=[Draws(image)])
    trainer.train(tiny_data(), max_steps=1)
    [(name, logged, step)] = gallery.images
    assert (name, logged.shape, logged.dtype, step) == ("sample", (4, 6, 3), np.uint8, 1)
    assert logged.min() == 255


def test_an_image_of_another_shape_is_an_error() -> None:
    trainer = Tracked(**tiny_parts(), trackers=[Gallery()], callbacks=[Draws(torch.ones(3, 4, 6))])
    with pytest.raises(OptionError, match=r"got shape \(3, 4, 6\) of torch.float32, and needs \(height, width\)"):
        trainer.train(tiny_data(), max_steps=1)


def test_an_image_outside_of_a_run_is_an_error() -> None:
    with pytest.raises(NoRunError, match="outside of a run"):
        Tracked(**tiny_parts()).log_image("sample", torch.ones(4, 6))

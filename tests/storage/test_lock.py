"""One run at a time writes to a directory. The next one takes it over when the process of the one before is gone."""

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from ptacc import Callback, CheckpointMixin, StepResult, Steps
from ptacc.errors import CheckpointError
from ptacc.storage import lock
from ptacc.storage.lock import LOCK, DirectoryLock, describe_process
from ptacc.storage.remote_store import open_store
from ptacc.testing import tiny_data
from tests.checkpoint.objects import FOLDER
from tests.checkpoint.runs import (
    SAMPLES,
    STEPS,
    KillableTrainer,
    history_file,
    make,
    open_run_store,
    run_for_exit_code,
    train,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an empty object store."""
    (tmp_path / "objects").mkdir()
    monkeypatch.setenv(FOLDER, str(tmp_path / "objects"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait half a second for a lock."""
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.5)


@contextlib.contextmanager
def child(act: Callable[[], object]) -> Iterator[int]:
    """Act in another process, which is killed in the end. Enter the block when it has written a byte."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.dup2(writing, 1)
        act()
        os._exit(0)
    os.close(writing)
    try:
        assert os.read(reading, 1)
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(reading)


def hold(directory: Path, seconds: float = 60.0) -> None:
    with DirectoryLock(open_store(directory)).held():
        os.write(1, b".")
        time.sleep(seconds)


def hold_with_a_worker(directory: Path) -> None:
    with DirectoryLock(open_store(directory)).held():
        if os.fork():
            os.write(1, b".")
        time.sleep(10)


@pytest.mark.usefixtures("impatient")
def test_a_directory_in_use_is_refused_with_the_name_of_its_user(tmp_path: Path) -> None:
    with child(lambda: hold(tmp_path)) as process:
        match = rf"is in use by another run: process {process} on {os.uname().nodename}, since 2"
        with pytest.raises(CheckpointError, match=match), DirectoryLock(open_store(tmp_path)).held():
            pass


def test_the_directory_of_a_killed_process_is_taken_over_though_a_worker_lives(tmp_path: Path) -> None:
    with child(lambda: hold_with_a_worker(tmp_path)) as process:
        os.kill(process, signal.SIGKILL)
        start = time.monotonic()
        with DirectoryLock(open_store(tmp_path)).held():
            assert time.monotonic() < start + 5
    assert not (tmp_path / LOCK).exists()


def test_a_process_that_is_ending_is_waited_for(tmp_path: Path) -> None:
    with child(lambda: hold(tmp_path, 1.0)), DirectoryLock(open_store(tmp_path)).held():
        assert b"process" in (tmp_path / LOCK).read_bytes()


@pytest.mark.usefixtures("impatient")
def test_a_leftover_of_a_process_with_this_number_on_this_host_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(describe_process())
    with DirectoryLock(open_store(tmp_path)).held():
        pass


def make_run(directory: Path, *callbacks: Callback[Any], **options: Any) -> KillableTrainer:
    trainer = make(directory, checkpoint_every=Steps(1), resume=True, **options)
    trainer.callbacks = [*trainer.callbacks, *callbacks]
    return trainer


class At(Callback[CheckpointMixin]):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.step, self.act = step, act

    @override
    def on_step_end(self, trainer: CheckpointMixin, step: StepResult) -> None:
        if step.step == self.step:
            self.act()


@pytest.mark.usefixtures("impatient")
def test_a_second_run_changes_nothing_of_the_first(tmp_path: Path) -> None:
    def pause() -> None:
        os.write(1, b".")
        time.sleep(60)

    with child(lambda: train(make_run(tmp_path, At(3, pause)))):
        before = history_file(tmp_path).read_bytes()
        with pytest.raises(CheckpointError, match="checkpoints is in use by another run"):
            train(make_run(tmp_path))
        assert history_file(tmp_path).read_bytes() == before
    train(make_run(tmp_path))
    assert [manifest.step for manifest in open_run_store(tmp_path).manifests()] == [*range(1, STEPS + 1)]


def test_a_failed_set_up_releases_the_directory(tmp_path: Path) -> None:
    trainer = make_run(tmp_path)
    with pytest.raises(ValueError, match="max_steps=0"):
        train(trainer, max_steps=0)
    trainer.checkpoint_dir, trainer.resume = tmp_path, tmp_path / "missing"
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        train(trainer)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("place", ["a disk without locks", "an object store"])
def test_without_locks_the_last_run_takes_over_and_the_first_cannot_save_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(file: object, flags: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", fail)
    directory = "objects://bucket/run" if place == "an object store" else str(tmp_path / "checkpoints")
    store = open_store(directory)
    options: dict[str, Any] = {"checkpoint_dir": directory, "filesystem": store.filesystem}

    def start_another() -> None:
        second = make_run(tmp_path / "b", resume_ignore={"history"}, **options)
        data = tiny_data(SAMPLES), tiny_data(SAMPLES)
        assert run_for_exit_code(lambda: second.train(*data, num_epochs=2, per_device_batch_size=4)) == 0

    with pytest.raises(CheckpointError, match=r"run was taken over|checkpoints was taken over"):
        train(make_run(tmp_path / "a", At(2, start_another), **options))
    assert [manifest.step for manifest in store.manifests()] == [*range(1, STEPS + 1)]

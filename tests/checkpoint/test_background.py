"""A run that is saved in the background: files, their order and reports are those of a save in the foreground."""

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from typing_extensions import override

from ptacc import Callback, StepResult
from ptacc.checkpoint.writer import copy_to_host
from ptacc.errors import CheckpointError
from ptacc.serialization.json_codec import encode
from ptacc.storage.store import CheckpointStore
from ptacc.testing import tiny_data
from ptacc.testing.laws import same
from tests.checkpoint.faults.disks import Interposed
from tests.checkpoint.faults.failing import Failing, Saving, calls_of_a_run, make, train, writers
from tests.devices import MPSTensor
from tests.ranks import run_ranks

PATIENCE = 30.0


class AtStep(Callback[Saving]):
    """Does something at the start of a step, after the run was saved before it."""

    def __init__(self, number: int, act: Any) -> None:
        self.number, self.act = number, act

    @override
    def on_step_start(self, trainer: Saving) -> None:
        if trainer.progress.steps + 1 == self.number:
            self.act()

    @override
    def on_step_end(self, trainer: Saving, step: StepResult) -> None: ...


def test_a_save_waits_for_the_copies_of_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    copies = copy_to_host(encode({"on host": torch.ones(2)}), {})
    assert not waits
    copies = copy_to_host(encode({"on device": torch.ones(2).as_subclass(MPSTensor)}), {})
    assert waits == [1]
    assert [tensor.tolist() for tensor in copies.tensors.values()] == [[1.0, 1.0]]


def background(directory: Path, **options: Any) -> Saving:
    return make(directory, checkpoint_in_background=True, **options)


def slow() -> Interposed:
    """Return a disk that takes its time to sync."""
    return Interposed(lambda number, name, arguments: time.sleep(0.03 * (name == "sync")))


def held(until: threading.Event) -> Interposed:
    """Return a disk that syncs none of a checkpoint's files before an event."""

    def before(number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "sync" and threading.current_thread() in writers():
            assert until.wait(PATIENCE)

    return Interposed(before)


def await_writers() -> None:
    for thread in writers():
        thread.join(PATIENCE)


def interrupt() -> None:
    assert len(writers()) == 1
    raise KeyError("of the user")


def test_the_calls_come_in_the_order_of_the_foreground(tmp_path: Path) -> None:
    background_calls = calls_of_a_run(tmp_path / "background", checkpoint_in_background=True)
    assert background_calls == calls_of_a_run(tmp_path / "foreground")


def test_training_continues_during_a_save_of_the_state_before(tmp_path: Path) -> None:
    train(make(tmp_path / "foreground", keep_last=None))
    proceed = threading.Event()
    train(
        background(
            tmp_path / "background", keep_last=None, filesystem=held(proceed), callbacks=[AtStep(4, proceed.set)]
        )
    )
    background_store, foreground_store = (CheckpointStore(str(tmp_path / way)) for way in ("background", "foreground"))
    for name in ("step-00000002", "step-00000004", "step-00000006"):
        files = [store.verify(name).files for store in (background_store, foreground_store)]
        tensors = [{file: written for file, written in some.items() if file.endswith("safetensors")} for some in files]
        assert len(tensors[0]) == 2
        assert same(*tensors)


def test_an_error_is_raised_after_the_next_step(tmp_path: Path) -> None:
    trainer = background(tmp_path / "run", filesystem=Failing(16, errno.EIO), callbacks=[AtStep(3, await_writers)])
    with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
        train(trainer)
    assert trainer.progress.steps == 3
    assert [*(tmp_path / "run").iterdir()] == []


def test_an_error_that_comes_late_is_raised_at_the_next_save(tmp_path: Path) -> None:
    proceed = threading.Event()
    trainer = background(tmp_path / "run", filesystem=Late(proceed), callbacks=[AtStep(4, proceed.set)])
    with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
        train(trainer)
    assert trainer.progress.steps == 4


class Late(Interposed):
    """A disk of which the first sync of a checkpoint fails, after an event and a while."""

    def __init__(self, until: threading.Event) -> None:
        super().__init__(self._fail)
        self.until = until

    def _fail(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "sync" and threading.current_thread() in writers():
            assert self.until.wait(PATIENCE)
            time.sleep(0.2)
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_the_last_save_has_ended_when_the_run_has(tmp_path: Path) -> None:
    train(background(tmp_path, filesystem=slow()))
    assert writers() == []
    assert CheckpointStore(str(tmp_path)).verify("step-00000006").step == 6


def test_the_error_of_the_last_save_is_raised_by_the_run(tmp_path: Path) -> None:
    calls = calls_of_a_run(tmp_path / "count")
    last = next(i for i, call in enumerate(calls) if (call.save, call.name) == (3, "rename"))
    with pytest.raises(CheckpointError, match=os.strerror(errno.EROFS)):
        train(background(tmp_path / "run", filesystem=Failing(last - 3, errno.EROFS)))
    assert CheckpointStore(str(tmp_path / "run")).names() == ["step-00000004"]


def test_a_run_that_ends_by_an_exception_completes_the_save_under_way(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="of the user"):
        train(background(tmp_path, filesystem=slow(), callbacks=[AtStep(3, interrupt)]))
    assert writers() == []
    assert CheckpointStore(str(tmp_path)).verify("step-00000002").step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_its_error_is_a_warning_in_addition_to_the_exception(tmp_path: Path) -> None:
    proceed = threading.Event()

    def end() -> None:
        proceed.set()
        interrupt()

    with pytest.raises(KeyError, match="of the user"), pytest.warns(UserWarning, match=os.strerror(errno.EIO)):
        train(background(tmp_path, filesystem=Late(proceed), callbacks=[AtStep(3, end)]))


class Breaking(Dataset[Any]):
    """Tiny data of which a sample of the fourth batch is bad, once the writers are done."""

    def __init__(self) -> None:
        self.left, self.samples = 3 * 4, tiny_data()

    def __len__(self) -> int:
        return len(self.samples)

    @override
    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            await_writers()
            raise RuntimeError("a bad sample")
        return self.samples[index]


def test_a_run_that_an_exception_ends_is_saved_though_the_save_before_failed(tmp_path: Path) -> None:
    trainer = background(tmp_path, filesystem=Failing(16, errno.EIO), keep_last=None)
    with pytest.raises(RuntimeError, match="a bad sample"), pytest.warns(UserWarning, match=os.strerror(errno.EIO)):
        trainer.train(Breaking(), num_epochs=2, per_device_batch_size=4)
    assert [CheckpointStore(str(tmp_path)).verify(name).step for name in CheckpointStore(str(tmp_path)).names()] == [3]


def saves_of_a_rank_that_fails(directory: Path) -> list[str]:
    callbacks = [AtStep(3, interrupt)] if os.environ["RANK"] == "1" else []
    with pytest.raises(Exception, match="of the user"):
        train(background(directory, filesystem=slow(), callbacks=callbacks))
    return [thread.name for thread in writers()]


def test_two_processes_complete_the_save_under_way(tmp_path: Path) -> None:
    assert run_ranks(saves_of_a_rank_that_fails, 2, tmp_path) == [[], []]
    assert CheckpointStore(str(tmp_path)).verify("step-00000002").step == 2

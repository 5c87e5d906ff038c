"""Runs on disks that fail: which system calls a run makes, a disk on which some fail, and what has to be there then."""

import dataclasses
import os
import re
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ptacc import CheckpointMixin, SeedMixin, Steps, Trainer
from ptacc.errors import CheckpointError
from ptacc.files.filesystem import FileSystem
from ptacc.storage.store import CheckpointStore
from ptacc.testing import tiny_data, tiny_parts
from tests.checkpoint.faults.disks import Interposed

STEPS = 6
OPENING, SAVE, ROTATION = "opening", "save", "rotation"


class Saving(CheckpointMixin, SeedMixin, Trainer):
    """Saves itself to a disk of ours, after every second of its six steps."""

    seed: int | None = 5
    filesystem: FileSystem = field(default_factory=FileSystem)

    @override
    def _store(self) -> CheckpointStore:
        return dataclasses.replace(super()._store(), filesystem=self.filesystem)


def make(directory: Path, **options: Any) -> Saving:
    usual: dict[str, Any] = {**tiny_parts(), "checkpoint_dir": directory, "checkpoint_every": Steps(2), "keep_last": 1}
    return Saving(**{**usual, **options})


def train(trainer: Saving) -> list[Tensor]:
    """Train, and return the weights that come out."""
    trainer.train(tiny_data(), num_epochs=2, per_device_batch_size=8 // trainer.distributed.world_size)
    assert trainer.progress.steps == STEPS
    return [tensor.clone() for tensor in trainer.model.state_dict().values()]


def same(weights: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(weights, others, strict=True))


def writers() -> list[threading.Thread]:
    """Return the threads that are saving a run."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("saving ")]


# ---- the calls of a run


@dataclass(frozen=True)
class Call:
    """A system call of a healthy run.

    Args:
        name: Of the call.
        path: What it is about, below the run's directory; of a rename the target. Without what is random in it.
        phase: What of the run it belongs to.
        save: The number of the save, from 1.
    """

    name: str
    path: str
    phase: str
    save: int


@dataclass
class Recorder:
    """Notes the calls of a run in a directory."""

    directory: Path
    calls: list[Call] = field(default_factory=list)
    _opened: dict[int, str] = field(default_factory=dict)
    _opening: str = ""
    _place: tuple[str, int] = (OPENING, 0)

    def before(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        """Note a call. What was opened last is what the next call on an unknown descriptor is about."""
        if isinstance(arguments[0], str):
            path = os.path.relpath(arguments[-1], self.directory)
            self._opening = path
        else:
            path = self._opened.setdefault(arguments[0], self._opening)
            if name == "close":
                del self._opened[arguments[0]]
        path = re.sub(r"(?<=[0-9]{8})-[0-9a-f]{8}", "", path)
        if name == "make_directory" and path.startswith(".partial-"):
            self._place = (SAVE, self._place[1] + 1)
        if name == "rename" and path.startswith(".removed-"):
            self._place = (ROTATION, self._place[1])
        self.calls.append(Call(name, path, *self._place))


def calls_of_a_run(directory: Path, **options: Any) -> list[Call]:
    """Return the system calls that a healthy run makes."""
    recorder = Recorder(directory)
    train(make(directory, filesystem=Interposed(recorder.before), **options))
    return recorder.calls


# ---- a disk that fails


class Failing(Interposed):
    """A disk on which a call fails.

    Args:
        at: The number of the call.
        error: The error's number.
        lasting: Whether all later calls fail as well, until the disk is mended.
    """

    def __init__(self, at: int, error: int, *, lasting: bool = False) -> None:
        super().__init__(self._fail)
        self.at, self.error, self.lasting = at, error, lasting
        self.is_mended = False
        self.failed = 0
        self.committed: list[str] = []

    def _fail(self, number: int, name: str, arguments: tuple[Any, ...]) -> None:
        is_hit = self.failed > 0 if number > self.at else number == self.at
        if is_hit and not self.is_mended and (self.lasting or not self.failed):
            self.failed += 1
            self.calls += 1
            paths = [argument for argument in arguments if isinstance(argument, str)]
            raise OSError(self.error, os.strerror(self.error), *[part for path in paths for part in (path, None)][:-1])
        if name == "rename" and Path(arguments[1]).name.startswith("step-"):
            self.committed.append(Path(arguments[1]).name)


# ---- what has to be there


def check_directory(directory: Path, committed: list[str]) -> None:
    """Check that the newest checkpoint is the last that was committed, that each is whole, and nothing else is seen."""
    store = CheckpointStore(str(directory))
    assert [name for name, found in store.verified() if isinstance(found, CheckpointError)] == []
    newest, _ = store.newest()
    assert (newest and newest.name) == (committed[-1] if committed else None)
    others = {path.name for path in directory.iterdir()} - set(store.names()) if directory.exists() else set[str]()
    assert all(name.startswith((".partial-", ".removed-")) for name in others), others


def check_resumes(directory: Path, expected: list[Tensor], **options: Any) -> None:
    """Check that the run resumes on a disk that works as if it had never failed, and that leftovers are removed."""
    assert same(train(make(directory, resume=True, **options)), expected)
    store = CheckpointStore(str(directory))
    assert sorted(path.name for path in directory.iterdir()) == store.names()
    assert f"step-{STEPS:08}" in store.names()


def outcome(trainer: Saving) -> tuple[list[Tensor] | CheckpointError, list[str]]:
    """Train, and return the weights or the error, and the warnings."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            ended: list[Tensor] | CheckpointError = train(trainer)
        except CheckpointError as error:
            ended = error
    return ended, [str(one.message) for one in warned]

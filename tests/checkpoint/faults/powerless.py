"""A disk that writes down, along a run, what a loss of power would leave of its checkpoints and its history."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from tests.checkpoint.faults.disks import CALLS, Directory, File, Losing, leave

FSYNC = os.fsync


@dataclass(frozen=True)
class Loss:
    """A loss of power.

    Args:
        left: The directory with what it left.
        least: Saves that were complete by then.
        most: Those, and one whose name might have reached the disk or not.
    """

    left: Path
    least: int
    most: int


class Logged:
    """A file that is appended to, with directories that may be new: what of them has been synced.

    Args:
        root: A directory that is durable.
        file: Somewhere below it.
    """

    def __init__(self, root: Path, file: Path) -> None:
        self.file = file
        self.names = {path: False for path in (file, *file.parents) if path.is_relative_to(root) and path != root}
        self.durable = b""

    def fsync(self, descriptor: int) -> None:
        """Stand in for `os.fsync`."""
        FSYNC(descriptor)
        synced = Path(f"/proc/self/fd/{descriptor}").readlink()
        if synced == self.file:
            self.durable = synced.read_bytes()
        for path in self.names:
            self.names[path] = self.names[path] or (path.parent == synced and path.exists())

    def leave(self, target: Path, chance: random.Random | None) -> None:
        """Write to `target` what would be left of the file; with `chance`, perhaps more than what was synced."""
        if not self.file.exists():
            return
        written = self.file.read_bytes()
        if all(self.names.values()) or (chance is not None and chance.random() < 0.5):
            more = 0 if chance is None else chance.randint(0, len(written) - len(self.durable))
            target.parent.mkdir(parents=True)
            target.write_bytes(written[: len(self.durable) + more])


class Powerless(Losing):
    """Writes down after every call what a loss of power would leave.

    Args:
        root: The directory that everything happens in.
        logged: The file of the history.
        target: Where to write it down, each loss in a directory of its own.
        chance: Decides which of the changes that were not synced survive; None where none does.
    """

    def __init__(self, root: Path, logged: Logged, target: Path, chance: random.Random | None) -> None:
        super().__init__(root)
        self.logged, self.target, self.chance = logged, target, chance
        self.losses: list[Loss] = []
        self._renamed = self._committed = 0
        target.mkdir()

    @override
    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._renamed += Path(target).name.startswith("step-")

    @override
    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        synced = self.opened[descriptor]
        if isinstance(synced, Directory) and any(name.startswith("step-") for name in synced.durable):
            self._committed = self._renamed

    def lose(self) -> None:
        left = self.target / f"{len(self.losses):03}"
        if self.chance is None:
            leave(self.tree, left)
        else:
            leave_some(self.tree, left, self.chance)
        self.logged.leave(left / self.logged.file.relative_to(self.root), self.chance)
        most = self._committed if self.chance is None else self._renamed
        self.losses.append(Loss(left, self._committed, most))


def _then_lose(name: str) -> Callable[..., object]:
    call = getattr(Powerless, name)

    def call_and_lose(self: Powerless, *arguments: Any) -> object:
        result = call(self, *arguments)
        self.lose()
        return result

    return call_and_lose


for _name in CALLS:
    setattr(Powerless, _name, _then_lose(_name))


def leave_some(directory: Directory, target: Path, chance: random.Random) -> None:
    """Write to `target` what was synced, and of what was not, what chance leaves: names, old or new, and bytes."""
    target.mkdir()
    for name in {**directory.durable, **directory.names}:
        before, now = directory.durable.get(name), directory.names.get(name)
        entry = now if now is before else chance.choice([before, now])
        if isinstance(entry, File):
            (target / name).write_bytes(choose_some(entry, chance))
        elif entry is not None:
            leave_some(entry, target / name, chance)


def choose_some(file: File, chance: random.Random) -> bytes:
    """Return what is left of a file: all of it where that was synced, else a part, or nothing but its length."""
    written = bytes(file.written)
    if written == file.durable:
        return written
    return chance.choice([file.durable, written[: chance.randint(0, len(written))], bytes(len(written))])

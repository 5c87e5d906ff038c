"""Disks for tests: they end the process at a call, fail at one, or note what was done."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import override

from ptacc.files.filesystem import FileSystem

CALLS = (
    "open_new",
    "write",
    "sync",
    "close",
    "open_directory",
    "make_directory",
    "rename",
    "remove_file",
    "remove_directory",
)


class Interposed(FileSystem):
    """Lets something happen before each system call: `before(number of the call, its name, its arguments)`."""

    def __init__(self, before: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.calls = 0
        self.before = before


def _interposed(name: str) -> Callable[..., Any]:
    def call(self: Interposed, *arguments: Any) -> Any:
        self.before(self.calls, name, arguments)
        self.calls += 1
        return getattr(super(Interposed, self), name)(*arguments)

    return call


for _name in CALLS:
    setattr(Interposed, _name, _interposed(_name))


def dying_at(number: int) -> Interposed:
    """Return a disk on which the process ends before the call of this number."""

    def before(call: int, name: str, arguments: tuple[Any, ...]) -> None:
        if call == number:
            os._exit(9)

    return Interposed(before)


def failing_at(number: int, error: int, only: frozenset[str] = frozenset(CALLS)) -> Interposed:
    """Return a disk whose call of this number, counted among those of some names, fails with an errno."""
    seen = 0

    def before(call: int, name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in only:
            seen += 1
            if seen == number + 1:
                raise OSError(error, os.strerror(error))

    return Interposed(before)


# ---- power loss


@dataclass
class File:
    """A file of a disk that loses its power: what was written, and what of it was synced."""

    written: bytearray = field(default_factory=bytearray)
    durable: bytes = b""


@dataclass
class Directory:
    """A directory: the names in it, and those that were synced."""

    names: dict[str, "File | Directory"] = field(default_factory=dict)
    durable: dict[str, "File | Directory"] = field(default_factory=dict)


class Losing(FileSystem):
    """Works as usual, and keeps account of what a loss of power would leave now: only what was synced.

    Args:
        root: The directory that everything happens in; it is durable, with what is in it at the start.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = self._read_tree(root)
        self.opened: dict[int, File | Directory] = {}
        self.states: list[Callable[[Path], None]] = []

    def _read_tree(self, path: Path) -> Directory:
        here = Directory()
        for entry in path.iterdir():
            if entry.is_dir():
                here.names[entry.name] = self._read_tree(entry)
            else:
                here.names[entry.name] = File(bytearray(entry.read_bytes()), entry.read_bytes())
        here.durable = dict(here.names)
        return here

    def _at(self, path: str | Path) -> Directory:
        here = self.tree
        for part in Path(path).relative_to(self.root).parts:
            inner = here.names[part]
            assert isinstance(inner, Directory)
            here = inner
        return here

    def _siblings(self, path: str) -> dict[str, "File | Directory"]:
        return self._at(Path(path).parent).names

    @override
    def open_new(self, path: str) -> int:
        descriptor = super().open_new(path)
        self.opened[descriptor] = self._siblings(path)[Path(path).name] = File()
        return descriptor

    @override
    def write(self, descriptor: int, data: memoryview) -> int:
        count = super().write(descriptor, data)
        file = self.opened[descriptor]
        assert isinstance(file, File)
        file.written += data[:count]
        return count

    @override
    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        synced = self.opened[descriptor]
        if isinstance(synced, File):
            synced.durable = bytes(synced.written)
        else:
            synced.durable = dict(synced.names)

    @override
    def close(self, descriptor: int) -> None:
        super().close(descriptor)
        del self.opened[descriptor]

    @override
    def open_directory(self, path: str) -> int:
        descriptor = super().open_directory(path)
        self.opened[descriptor] = self._at(path) if Path(path).is_relative_to(self.root) else Directory()
        return descriptor

    @override
    def make_directory(self, path: str) -> None:
        super().make_directory(path)
        self._siblings(path)[Path(path).name] = Directory()

    @override
    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self._siblings(target)[Path(target).name] = self._siblings(source).pop(Path(source).name)

    @override
    def remove_file(self, path: str) -> None:
        super().remove_file(path)
        del self._siblings(path)[Path(path).name]

    @override
    def remove_directory(self, path: str) -> None:
        super().remove_directory(path)
        del self._siblings(path)[Path(path).name]

    def leave(self, target: Path) -> None:
        """Write to `target` what a loss of power would leave."""
        leave(self.tree, target)


def leave(directory: Directory, target: Path) -> None:
    target.mkdir()
    for name, entry in directory.durable.items():
        if isinstance(entry, File):
            (target / name).write_bytes(entry.durable)
        else:
            leave(entry, target / name)

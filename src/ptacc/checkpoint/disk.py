"""The disk: one method for each system call that a checkpoint makes, and the durable operations made of them.

What is written reaches the disk in the order in which it is synced: a file's bytes by the sync of the file, its name by
the sync of its directory. Tests put a disk in the place of this one that fails, or ends the process, at any call.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ptacc.errors import DamagedCheckpointError

CHUNK = 1 << 22
"""Bytes that are hashed and written at a time, while they are in the processor's cache."""


class Disk:
    """The system calls, each under its own name."""

    def open_new(self, path: Path) -> int:
        """Open a file that does not exist yet."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write, and return how many bytes were."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file or a directory."""
        os.close(descriptor)

    def open_directory(self, path: Path) -> int:
        """Open a directory to sync it."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def make_directory(self, path: Path) -> None:
        """Make a directory that does not exist yet."""
        path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        """Give a directory another name, which must be free."""
        source.rename(target)

    def remove_file(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()


@dataclass(frozen=True, slots=True)
class Written:
    """A file as it was written.

    Args:
        sha256: In hexadecimal digits.
        size: In bytes.
    """

    sha256: str
    size: int


def write_file(disk: Disk, path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Write a new file durably, and hash it on the way. Its name is durable once its directory is synced."""
    digest, size = hashlib.sha256(), 0
    descriptor = disk.open_new(path)
    try:
        for chunk in chunks_of(parts):
            digest.update(chunk)
            size += len(chunk)
            rest = chunk
            while rest:
                rest = rest[disk.write(descriptor, rest) :]
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)
    return Written(digest.hexdigest(), size)


def sync_directory(disk: Disk, path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = disk.open_directory(path)
    try:
        disk.sync(descriptor)
    finally:
        disk.close(descriptor)


def remove_tree(disk: Disk, path: Path) -> None:
    """Remove a directory and the files in it; links in it are removed, not followed."""
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            remove_tree(disk, entry)
        else:
            disk.remove_file(entry)
    disk.remove_directory(path)


def read_file(path: Path, size: int) -> bytes:
    """Read a file of a known size, which is no link.

    Raises:
        DamagedCheckpointError: It is missing, a link, no file at all, or of another size.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"
        raise DamagedCheckpointError(f"{path} {what}.") from error
    with open(descriptor, "rb") as file:  # noqa: PTH123  # a path may be another file by now
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedCheckpointError(f"{path} is no file.")
        if status.st_size != size:
            raise DamagedCheckpointError(f"{path} has {status.st_size} bytes, and was written with {size}.")
        return file.read(size)


def chunks_of(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Cut parts into chunks."""
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]

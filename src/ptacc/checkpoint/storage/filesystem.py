"""The disk: one method for each system call that a checkpoint makes, and the durable operations made of them.

What is written reaches the disk in the order in which it is synced: a file's bytes by the sync of the file, its name by
the sync of its directory. Tests put a disk in the place of this one that fails, or ends the process, at any call; and
`remote.py` has one that is not on this machine.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from ptacc.errors import CheckpointError, DamagedCheckpointError

CHUNK = 1 << 22
"""Bytes that are hashed and written at a time, while they are in the processor's cache."""
LONG = 1 << 20
"""Bytes that take longer to hash than it takes to hand them to another thread."""
PARTIAL = ".partial-"
"""How the names of what is being written begin."""


class FileSystem:
    """The system calls, each under its own name."""

    damage: ClassVar[type[OSError]] = OSError
    """Which errors in reading a file are damage to it: those of a disk of this machine all are."""
    shows_whole_files: ClassVar[bool] = False
    """Whether a new file appears when it is closed, whole, in the place of one that was there."""
    span: ClassVar[int] = CHUNK
    """Bytes to read at a time of a file that is not kept in memory."""

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

    def abandon(self, descriptor: int) -> None:
        """Close a file that was not written to its end."""
        self.close(descriptor)

    def is_there(self, path: Path) -> bool:
        """Whether there is anything at a path, be it a link that leads nowhere."""
        return os.path.lexists(path)

    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file that is there, to be read."""
        with open(open_descriptor(path), "rb") as file:  # a path may be another file by now
            yield file

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


def write_file(disk: FileSystem, path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Write a new file durably, and hash it meanwhile. Its name is durable once its directory is synced."""
    digest, size = hashlib.sha256(), 0
    with naming(path), ThreadPoolExecutor(1, "hashing") as beside:
        descriptor = disk.open_new(path)
        try:
            for chunk in split_chunks(parts):
                size += len(chunk)
                if len(chunk) < LONG:
                    digest.update(chunk)
                    write_chunk(disk, descriptor, chunk)
                else:
                    hashing = beside.submit(digest.update, chunk)
                    write_chunk(disk, descriptor, chunk)
                    hashing.result()
            disk.sync(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to raise
                disk.abandon(descriptor)
            raise
        disk.close(descriptor)
    return Written(digest.hexdigest(), size)


def write_whole(
    disk: FileSystem, path: Path, parts: Iterable[bytes | memoryview], check: Callable[[], object] = lambda: None
) -> Written:
    """Write a file that others may look for meanwhile: it is there whole or not at all.

    Args:
        disk: What writes.
        path: Where to; a file that is there is replaced.
        parts: What to write.
        check: Called before the file gets its name; raises an error where it must not.
    """
    if disk.shows_whole_files:
        check()
        return write_file(disk, path, parts)
    beside = path.parent / f"{PARTIAL}{secrets.token_hex(8)}"
    try:
        written = write_file(disk, beside, parts)
        check()
        disk.rename(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove_file(beside)
        raise
    return written


def write_chunk(disk: FileSystem, descriptor: int, chunk: memoryview) -> None:
    """Write all of a chunk: a system call may write a part of what it is given."""
    while chunk:
        chunk = chunk[disk.write(descriptor, chunk) :]


def sync_directory(disk: FileSystem, path: Path) -> None:
    """Make the names in a directory durable."""
    with naming(path):
        descriptor = disk.open_directory(path)
        try:
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the disk say what it is of: that of a descriptor has no name."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def as_checkpoint_error(path: Path) -> Iterator[None]:
    """Let an error of the disk be one of the checkpoints at a path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error


def remove_tree(disk: FileSystem, path: Path) -> None:
    """Remove a directory and what is in it, however deep; links are removed, not followed."""
    directories, waiting = [], [path]
    while waiting:
        entry = waiting.pop()
        if entry.is_dir() and not entry.is_symlink():
            directories.append(entry)
            waiting += sorted(entry.iterdir(), reverse=True)
        else:
            disk.remove_file(entry)
    for directory in reversed(directories):
        disk.remove_directory(directory)


def read_file(disk: FileSystem, path: Path, size: int) -> bytes:
    """Read a file of a known size; neither it nor its directory may be a link.

    Raises:
        DamagedCheckpointError: It is missing, a link, no file at all, of another size, or cannot be read.
        CheckpointError: This machine does not have the memory for it.
        OSError: What holds it cannot be reached: that is no damage.
    """
    with opened(disk, path, size) as file:
        return file.read(size)


def hash_file(disk: FileSystem, path: Path, size: int) -> str:
    """Return the SHA-256 of a file of a known size, as `read_file` would read it, without keeping it in memory."""
    digest = hashlib.sha256()
    with opened(disk, path, size) as file:
        for start in range(0, size, disk.span):
            digest.update(file.read(min(disk.span, size - start)))
    return digest.hexdigest()


def read_at_most(disk: FileSystem, path: Path, size: int) -> bytes:
    """Read a file of an unknown size that is not above `size`."""
    with opened(disk, path) as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise DamagedCheckpointError(f"{path} has more than the {size} bytes that such a file may have.")
    return data


@contextlib.contextmanager
def opened(disk: FileSystem, path: Path, size: int | None = None) -> Iterator[BinaryIO]:
    """Open a file to be read; whatever is wrong with it, or with a disk of this machine, is damage."""
    try:
        with disk.reading(path) as file:
            if size is not None:
                check_size(path, file.seek(0, os.SEEK_END), size)
                file.seek(0)
            yield file
    except disk.damage as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def open_descriptor(path: Path) -> int:
    """Open a file in a directory, both of which are what they seem to be, and return its descriptor."""
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # A pipe that nobody writes to would be waited for.
            descriptor = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as error:
        what = "is a link, or in one" if error.errno in (errno.ELOOP, errno.ENOTDIR) else "cannot be opened"
        raise DamagedCheckpointError(f"{path} {what}: {error.strerror}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedCheckpointError(f"{path} is no file.")
    return descriptor


def check_size(path: Path, size: int, written: int) -> None:
    """Raise an error for a file of another size than was written, and for one that is too large to be read."""
    if size != written:
        raise DamagedCheckpointError(f"{path} has {size} bytes, and was written with {written}.")
    # Next to nothing of it need be on the disk: what says that it is a terabyte would be read for an hour.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise CheckpointError(f"{path} has {size} bytes, and this machine has a memory of {memory}.")


def split_chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Cut parts into chunks."""
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]

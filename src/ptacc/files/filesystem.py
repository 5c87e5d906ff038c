"""File systems: what a checkpoint needs of one, and the durable writes and checked reads built on it.

Paths are strings with "/" between names: local paths here, URLs in `remote_filesystem.py`. What is written to a local
disk becomes durable in the order of the syncs: the content of a file when the file is synced, its name when its
directory is synced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Literal, TypeAlias

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.files.paths import split_path

Kind: TypeAlias = Literal["file", "directory", "other"]
CHUNK_SIZE = 1 << 22
"""Bytes that are hashed and written at a time, while they are in the processor's cache."""
READ_SIZE = 1 << 25
"""Bytes that are read and hashed at a time. On a remote file system, each read is a request."""
PARALLEL_HASH_SIZE = 1 << 20
"""Bytes from which hashing in another thread saves more time than the hand-over costs."""
PARTIAL = ".partial-"
"""Prefix of the names of incomplete checkpoints and files."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The SHA-256 of a file's content in hexadecimal digits, and its size in bytes."""

    sha256: str
    size: int


class FileSystem:
    """The local file system. Errors are `OSError`s that contain the path.

    Each system call that writes is a method, so that tests can make it fail or end the process before it.
    """

    corruption_errors: ClassVar[type[OSError]] = OSError
    """The errors of reading that mean a damaged file. Other errors mean that the file system cannot be reached."""

    # ---- system calls

    def open_new(self, path: str) -> int:
        """Create a file, and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)

    def open_directory(self, path: str) -> int:
        """Open a directory to sync it, and return its descriptor."""
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write to a file, and return the number of bytes written, which may be fewer than given."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until the content of a file or directory is durable."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a file or directory."""
        os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        """Rename a file or directory."""
        Path(source).rename(target)

    def make_directory(self, path: str) -> None:
        """Create a directory in an existing one."""
        Path(path).mkdir()

    def remove_file(self, path: str) -> None:
        """Remove a file or a link."""
        Path(path).unlink()

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""
        Path(path).rmdir()

    # ---- writing

    @contextlib.contextmanager
    def create(self, path: str) -> Generator[Callable[[memoryview], object]]:
        """Create a file, and yield the function that writes to it. The content is durable when the context exits."""

        def write(data: memoryview) -> None:
            while data:
                data = data[self.write(descriptor, data) :]

        with self._synced(path, self.open_new) as descriptor:
            yield write

    def write_file(self, path: str, parts: Iterable[bytes | memoryview]) -> FileDigest:
        """Write a new file durably, and hash it at the same time. Its name is durable once its directory is synced."""
        digest, size = hashlib.sha256(), 0
        with ThreadPoolExecutor(1, "hashing") as hasher, self.create(path) as write:
            for chunk in split_chunks(parts):
                size += len(chunk)
                if len(chunk) < PARALLEL_HASH_SIZE:
                    digest.update(chunk)
                    write(chunk)
                else:
                    hashing = hasher.submit(digest.update, chunk)
                    write(chunk)
                    hashing.result()
        return FileDigest(digest.hexdigest(), size)

    def replace_file(
        self, path: str, parts: Iterable[bytes | memoryview], check: Callable[[], object] = lambda: None
    ) -> FileDigest:
        """Write a file that appears complete, in place of an existing one. An error in `check` prevents that."""
        partial = str(Path(path).with_name(f"{PARTIAL}{secrets.token_hex(8)}"))
        try:
            digest = self.write_file(partial, parts)
            check()
            self.rename(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove_file(partial)
            raise
        return digest

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        with self._synced(path, self.open_directory):
            pass

    @contextlib.contextmanager
    def _synced(self, path: str, open_path: Callable[[str], int]) -> Generator[int]:
        """Sync and close what `open_path` opens. An `OSError` of its descriptor gets the path."""
        try:
            descriptor = open_path(path)
            try:
                yield descriptor
                self.sync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is raised
                    self.close(descriptor)
                raise
            self.close(descriptor)
        except OSError as error:
            if error.errno is not None and error.filename is None:
                error.filename = path
            raise

    def remove_tree(self, path: str) -> None:
        """Remove a file, a link, or a directory with everything below it, if there is one."""
        parent, name = split_path(path)
        siblings = self.list_directory(parent)
        remaining = [(path, siblings[name])] if name in siblings else []
        directories: list[str] = []
        while remaining:  # not a recursion, since directories may be nested too deeply for one
            path, is_directory = remaining.pop()
            if is_directory:
                directories.append(path)
                remaining += [(f"{path}/{child}", kind) for child, kind in sorted(self.list_directory(path).items())]
            else:
                self.remove_file(path)
        for directory in reversed(directories):
            self.remove_directory(directory)

    # ---- looking

    def get_kind(self, path: str) -> Kind | None:
        """Return what is at a path, None for nothing. Links are followed; a broken link is "other"."""
        try:
            mode = Path(path).stat().st_mode
        except OSError as error:
            if Path(path).is_symlink():
                return "other"
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"

    def exists(self, path: str) -> bool:
        """Whether there is anything at a path, including a broken link."""
        return self.get_kind(path) is not None

    def is_directory(self, path: str) -> bool:
        """Whether a path, or the target of a link, is a directory."""
        return self.get_kind(path) == "directory"

    def list_directory(self, path: str) -> dict[str, bool]:
        """Return the names in a directory, and whether each is a directory itself. Empty if nothing is at the path."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        return {}

    # ---- reading

    @contextlib.contextmanager
    def open(self, path: str) -> Generator[BinaryIO]:
        """Open a regular file for reading. Neither the file nor its directory may be a link."""
        try:  # on descriptors, since a path may lead to another file a moment later
            directory = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # O_NONBLOCK: opening a pipe without a writer would block.
                descriptor = os.open(Path(path).name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
            finally:
                os.close(directory)
        except OSError as error:
            reason = "is a link, or in one" if error.errno in (errno.ELOOP, errno.ENOTDIR) else "cannot be opened"
            raise DamagedCheckpointError(f"{path} {reason}: {error.strerror}.") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedCheckpointError(f"{path} is not a regular file.")
        with os.fdopen(descriptor, "rb") as file:
            yield file

    def read_file(self, path: str, size: int) -> bytes:
        """Read a file of a known size.

        Raises:
            DamagedCheckpointError: It is missing, a link, not a regular file, of another size, or cannot be read.
            OSError: The file system cannot be reached.
        """
        with self._open_checked(path, size) as file:
            return file.read(size)

    def hash_file(self, path: str, size: int) -> str:
        """Return the SHA-256 of a file of a known size, with the errors of `read_file`."""
        digest = hashlib.sha256()
        with self._open_checked(path, size) as file:
            for start in range(0, size, READ_SIZE):
                digest.update(file.read(min(READ_SIZE, size - start)))
        return digest.hexdigest()

    def check_size(self, path: str, size: int) -> None:
        """Raise an error of `read_file` for a file that cannot be opened, or has another size."""
        with self._open_checked(path, size):
            pass

    def read_at_most(self, path: str, size: int) -> bytes:
        """Read a file of unknown size, with the errors of `read_file`. A file of more than `size` bytes is damaged."""
        with self._open_checked(path) as file:
            data = file.read(size + 1)
        if len(data) > size:
            raise DamagedCheckpointError(f"{path} is larger than the limit of {size} bytes for such a file.")
        return data

    @contextlib.contextmanager
    def _open_checked(self, path: str, size: int | None = None) -> Generator[BinaryIO]:
        try:
            with self.open(path) as file:
                if size is not None:
                    if (actual := file.seek(0, os.SEEK_END)) != size:
                        raise DamagedCheckpointError(f"{path} has {actual} bytes, but was written with {size}.")
                    file.seek(0)
                yield file
        except self.corruption_errors as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def split_chunks(parts: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """Split parts into chunks of at most `CHUNK_SIZE` bytes."""
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), CHUNK_SIZE):
            yield view[start : start + CHUNK_SIZE]


@contextlib.contextmanager
def as_checkpoint_error(path: str) -> Generator[None]:
    """Raise an `OSError` as a `CheckpointError` that starts with a path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error

"""File systems: what a checkpoint needs of one, and the durable writes and checked reads built on it.

Paths are strings with "/" between names: local paths (`local_filesystem.py`) or URLs (`remote_filesystem.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, ClassVar, Literal, TypeAlias

from ptacc.checkpoint.storage.paths import split_path
from ptacc.errors import CheckpointError, DamagedCheckpointError

Kind: TypeAlias = Literal["file", "directory", "other"]
WRITE_SIZE = 1 << 22
"""Bytes that are hashed and written at a time, while they are in the processor's cache."""
PARALLEL_HASH_SIZE = 1 << 20
"""Bytes from which hashing in another thread saves more time than the hand-over costs."""
PARTIAL = ".partial-"
"""Prefix of the names of incomplete checkpoints and files."""


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What identifies the content of a file.

    Args:
        sha256: In hexadecimal digits.
        size: In bytes.
    """

    sha256: str
    size: int


class FileSystem(ABC):
    """A file system. Errors are `OSError`s that contain the path."""

    corruption_errors: ClassVar[type[OSError]]
    """The errors of reading that mean a damaged file; others mean that the file system cannot be reached."""
    chunk_size: ClassVar[int]
    """Bytes to read at a time when a file is hashed."""

    @abstractmethod
    def create(self, path: str) -> AbstractContextManager[Callable[[memoryview], object]]:
        """Create a file, and yield the function that writes to it. The content is durable when the context exits."""

    @abstractmethod
    def open(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Open a file for reading."""

    @abstractmethod
    def get_kind(self, path: str) -> Kind | None:
        """Return what is at a path, None for nothing. Links are followed; a broken link is "other"."""

    @abstractmethod
    def list_directory(self, path: str) -> dict[str, bool]:
        """Return the names in a directory, and whether each is a directory: a link is not. Empty if there is none."""

    @abstractmethod
    def make_directory(self, path: str) -> None:
        """Create a directory in an existing one."""

    @abstractmethod
    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""

    @abstractmethod
    def remove_file(self, path: str) -> None:
        """Remove a file or a link."""

    @abstractmethod
    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""

    @abstractmethod
    def replace_file(
        self, path: str, parts: Iterable[bytes | memoryview], check: Callable[[], object] = lambda: None
    ) -> FileDigest:
        """Write a file that appears at once and complete, in place of an existing one.

        Args:
            path: The file.
            parts: The content.
            check: Called before the file appears; raises an error to prevent that.
        """

    # ---- writing

    def write_file(self, path: str, parts: Iterable[bytes | memoryview]) -> FileDigest:
        """Write a new file durably. On a local file system, its name is durable once its directory is synced."""
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

    def remove_tree(self, path: str) -> None:
        """Remove a file, a link, or a directory with everything below it, if there is one."""
        parent, name = split_path(path)
        siblings = self.list_directory(parent)
        remaining = [(path, siblings[name])] if name in siblings else []
        directories: list[str] = []
        while remaining:  # not a recursion: directories may be nested more deeply than Python allows calls to be
            path, is_directory = remaining.pop()
            if is_directory:
                directories.append(path)
                remaining += [(f"{path}/{child}", kind) for child, kind in self.list_directory(path).items()]
            else:
                self.remove_file(path)
        for directory in reversed(directories):
            self.remove_directory(directory)

    # ---- reading

    def is_directory(self, path: str) -> bool:
        """Whether a path, or the target of a link, is a directory."""
        return self.get_kind(path) == "directory"

    def exists(self, path: str) -> bool:
        """Whether there is anything at a path, including a broken link."""
        return self.get_kind(path) is not None

    def read_file(self, path: str, size: int) -> bytes:
        """Read a file of a known size.

        Raises:
            DamagedCheckpointError: It is missing, a link, not a regular file, of another size, or cannot be read.
            OSError: The file system cannot be reached.
        """
        with self._open_checked(path, size) as file:
            return file.read(size)

    def hash_file(self, path: str, size: int) -> str:
        """Return the SHA-256 of a file of a known size; the errors are those of `read_file`."""
        digest = hashlib.sha256()
        with self._open_checked(path, size) as file:
            for start in range(0, size, self.chunk_size):
                digest.update(file.read(min(self.chunk_size, size - start)))
        return digest.hexdigest()

    def read_at_most(self, path: str, size: int) -> bytes:
        """Read a file of unknown size, with the errors of `read_file`. A file of more than `size` bytes is damaged."""
        with self._open_checked(path) as file:
            data = file.read(size + 1)
        if len(data) > size:
            raise DamagedCheckpointError(f"{path} is larger than the limit of {size} bytes for such a file.")
        return data

    @contextlib.contextmanager
    def _open_checked(self, path: str, size: int | None = None) -> Iterator[BinaryIO]:
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
    """Split parts into chunks of at most `WRITE_SIZE` bytes."""
    for part in parts:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), WRITE_SIZE):
            yield view[start : start + WRITE_SIZE]


@contextlib.contextmanager
def as_checkpoint_error(path: str) -> Iterator[None]:
    """Raise an `OSError` as a `CheckpointError` that starts with a path."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error

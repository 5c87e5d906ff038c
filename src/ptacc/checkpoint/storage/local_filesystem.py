"""The local file system, with one method for each system call that writes.

What is written becomes durable in the order of the syncs: the content of a file when the file is synced, its name when
its directory is synced. Tests replace single system calls, to fail or to end the process at any of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar

from typing_extensions import override

from ptacc.checkpoint.storage.filesystem import PARTIAL, WRITE_SIZE, FileDigest, FileSystem, Kind
from ptacc.errors import DamagedCheckpointError


class LocalFileSystem(FileSystem):
    """The file systems of this machine, including network mounts."""

    corruption_errors: ClassVar[type[OSError]] = OSError
    chunk_size: ClassVar[int] = WRITE_SIZE

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

    @override
    def make_directory(self, path: str) -> None:
        Path(path).mkdir()

    @override
    def remove_file(self, path: str) -> None:
        Path(path).unlink()

    @override
    def remove_directory(self, path: str) -> None:
        Path(path).rmdir()

    # ---- writing

    @override
    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Callable[[memoryview], object]]:
        def write(data: memoryview) -> None:
            while data:
                data = data[self.write(descriptor, data) :]

        with with_filename(path):
            descriptor = self.open_new(path)
            try:
                yield write
                self.sync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is raised
                    self.close(descriptor)
                raise
            self.close(descriptor)

    @override
    def replace_file(
        self, path: str, parts: Iterable[bytes | memoryview], check: Callable[[], object] = lambda: None
    ) -> FileDigest:
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

    @override
    def sync_directory(self, path: str) -> None:
        with with_filename(path):
            descriptor = self.open_directory(path)
            try:
                self.sync(descriptor)
            finally:
                self.close(descriptor)

    # ---- reading

    @override
    def get_kind(self, path: str) -> Kind | None:
        try:
            mode = Path(path).stat().st_mode
        except OSError as error:
            if Path(path).is_symlink():
                return "other"
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return None
            raise
        return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"

    @override
    def list_directory(self, path: str) -> dict[str, bool]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
        return {}

    @override
    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """Open a regular file for reading. Neither the file nor its directory may be a link."""
        with open(open_regular_file(path), "rb") as file:
            yield file


def open_regular_file(path: str) -> int:
    """Return the descriptor of a file; raise `DamagedCheckpointError` if it or its directory is a link.

    The checks are made on descriptors: a path may lead to another file by the time that it is opened.
    """
    try:
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
    return descriptor


@contextlib.contextmanager
def with_filename(path: str) -> Iterator[None]:
    """Add the path to an `OSError` that was raised for a descriptor."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = path
        raise

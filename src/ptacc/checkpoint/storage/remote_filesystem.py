"""The file systems of other machines, through fsspec.

They are treated as object stores: a file appears when it is closed, directories are parts of names, and there is no
renaming. Errors of any type that fsspec raises become `OSError`s that contain the URL.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Final

from typing_extensions import override

from ptacc.checkpoint.storage.filesystem import FileDigest, FileSystem, Kind
from ptacc.checkpoint.storage.paths import is_url
from ptacc.errors import CheckpointError

if TYPE_CHECKING:
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

ERROR_NUMBERS: Final[tuple[tuple[type[OSError], int], ...]] = (
    (FileNotFoundError, errno.ENOENT),
    (FileExistsError, errno.EEXIST),
    (NotADirectoryError, errno.ENOTDIR),
    (IsADirectoryError, errno.EISDIR),
    (PermissionError, errno.EACCES),
    (TimeoutError, errno.ETIMEDOUT),
)
"""The numbers of errors without one, by which Python gives the new error the same class."""


class RemoteFileSystem(FileSystem):
    """The file systems of fsspec; a URL says which. The system calls of a local disk are not used."""

    corruption_errors: ClassVar[type[OSError]] = FileNotFoundError
    read_size: ClassVar[int] = 1 << 25

    @override
    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[Callable[[memoryview], object]]:
        """Create a file, in place of an existing one. It appears when the context exits without an error."""
        with as_os_error(path):
            filesystem, name = connect(path)
            file = filesystem.open(name, "wb")

        def write(data: memoryview) -> None:
            with as_os_error(path):
                file.write(bytes(data))

        try:
            yield write
            with as_os_error(path):
                file.close()
        except BaseException:
            with contextlib.suppress(Exception):
                self._discard(path, file)
            raise

    def _discard(self, path: str, file: AbstractBufferedFile | BinaryIO) -> None:
        from fsspec.spec import AbstractBufferedFile

        if isinstance(file, AbstractBufferedFile):
            file.closed = True  # otherwise the rest is uploaded when the object is collected
            file.discard()
        else:  # such a file is visible from the start
            file.close()
            self.remove_file(path)

    @override
    def replace_file(
        self, path: str, parts: Iterable[bytes | memoryview], check: Callable[[], object] = lambda: None
    ) -> FileDigest:
        check()
        return self.write_file(path, parts)

    @override
    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        with as_os_error(path):
            filesystem, name = connect(path)
            with filesystem.open(name, "rb", cache_type="none") as file:
                yield file

    @override
    def get_kind(self, path: str) -> Kind | None:
        try:
            with as_os_error(path):
                filesystem, name = connect(path)
                # fsspec's `exists` and `isdir` return False where the file system cannot be reached.
                kind: Kind = filesystem.info(name)["type"]
                return kind
        except (FileNotFoundError, NotADirectoryError):
            return None

    @override
    def list_directory(self, path: str) -> dict[str, bool]:
        try:
            with as_os_error(path):
                filesystem, name = connect(path)
                entries = filesystem.ls(name, detail=True)
        except FileNotFoundError:
            return {}
        # Web consoles create an empty object in place of a directory, which is listed in itself.
        children = [entry for entry in entries if entry["name"].strip("/") != name.strip("/")]
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] == "directory" for entry in children}

    @override
    def make_directory(self, path: str) -> None:
        """Create a directory that may exist, on file systems that have directories."""
        with contextlib.suppress(FileExistsError), as_os_error(path):
            filesystem, name = connect(path)
            filesystem.mkdir(name, create_parents=False)

    @override
    def sync_directory(self, path: str) -> None:
        """Do nothing: a file that was closed is durable, and so is its name."""

    @override
    def remove_file(self, path: str) -> None:
        """Remove a file that may be missing: the client may repeat a request that had succeeded."""
        with contextlib.suppress(FileNotFoundError), as_os_error(path):
            filesystem, name = connect(path)
            filesystem.rm_file(name)

    @override
    def remove_tree(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), as_os_error(path):
            filesystem, name = connect(path)
            filesystem.rm(name, recursive=True)


def connect(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL, with its cache of listings cleared, and the name of the file there."""
    from fsspec.core import url_to_fs

    filesystem, name = url_to_fs(url)
    # Other hosts write to it. Not every file system can be configured to keep no listings.
    filesystem.invalidate_cache()
    return filesystem, name


@contextlib.contextmanager
def as_os_error(path: str) -> Iterator[None]:
    """Raise any error of a file system as an `OSError` that contains the path."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            number, message = error.errno, error.strerror or ""
        else:
            number = next((number for kind, number in ERROR_NUMBERS if isinstance(error, kind)), errno.EIO)
            message = f"{type(error).__name__}: {error}"
        raise OSError(number, message, path) from error


def select_filesystem(path: str) -> FileSystem:
    """Return the file system of a local path or a URL."""
    return RemoteFileSystem() if is_url(path) else FileSystem()

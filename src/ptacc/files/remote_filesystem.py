"""The file systems of other machines, through fsspec.

They are treated as object stores: a file appears when it is closed, directories are parts of names, and nothing can be
renamed. Errors of any type that fsspec raises become `OSError`s that contain the URL.
"""

from __future__ import annotations

import contextlib
import errno
import posixpath
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Final

from typing_extensions import override

from ptacc.errors import CheckpointError
from ptacc.files.filesystem import FileDigest, FileSystem, Kind
from ptacc.files.paths import is_url

if TYPE_CHECKING:
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

ERROR_NUMBERS: Final[Mapping[type[OSError], int]] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    NotADirectoryError: errno.ENOTDIR,
    PermissionError: errno.EACCES,
}
"""The numbers of errors that fsspec raises without one. From the number, Python derives the class of the new error."""


class RemoteFileSystem(FileSystem):
    """The file systems of fsspec; a URL says which. The system calls of a local disk are not used."""

    corruption_errors: ClassVar[type[OSError]] = FileNotFoundError

    @override
    @contextlib.contextmanager
    def create(self, path: str) -> Generator[Callable[[memoryview], object]]:
        """Create a file, in place of an existing one. It appears when the context exits without an error."""
        with connect(path) as (filesystem, name):
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
    def open(self, path: str) -> Generator[BinaryIO]:
        with connect(path) as (filesystem, name), filesystem.open(name, "rb", cache_type="none") as file:
            yield file

    @override
    def get_kind(self, path: str) -> Kind | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), connect(path) as (filesystem, name):
            # fsspec's `exists` and `isdir` return False where the file system cannot be reached.
            kind: Kind = filesystem.info(name)["type"]
            return kind
        return None

    @override
    def list_directory(self, path: str) -> dict[str, bool]:
        with contextlib.suppress(FileNotFoundError), connect(path) as (filesystem, name):
            entries = filesystem.ls(name, detail=True)
            # Web consoles create an empty object in place of a directory, which is listed in itself.
            children = [entry for entry in entries if entry["name"].strip("/") != name.strip("/")]
            return {posixpath.basename(entry["name"].rstrip("/")): entry["type"] == "directory" for entry in children}
        return {}

    @override
    def make_directory(self, path: str) -> None:
        """Create a directory that may exist, on file systems that have directories."""
        with contextlib.suppress(FileExistsError), connect(path) as (filesystem, name):
            filesystem.mkdir(name, create_parents=False)

    @override
    def sync_directory(self, path: str) -> None:
        """Do nothing: a file that was closed is durable, and so is its name."""

    @override
    def remove_file(self, path: str) -> None:
        """Remove a file that may be missing: the client may repeat a request that had succeeded."""
        with contextlib.suppress(FileNotFoundError), connect(path) as (filesystem, name):
            filesystem.rm_file(name)

    @override
    def remove_directory(self, path: str) -> None:
        """Remove an empty directory that may be missing: on an object store it disappears with its last file."""
        with contextlib.suppress(FileNotFoundError), connect(path) as (filesystem, name):
            filesystem.rmdir(name)


@contextlib.contextmanager
def connect(url: str) -> Generator[tuple[AbstractFileSystem, str]]:
    """Yield the file system of a URL and the name of the file there. Errors become `OSError`s that contain the URL."""
    from fsspec.core import url_to_fs

    with as_os_error(url):
        filesystem, name = url_to_fs(url)
        filesystem.invalidate_cache()  # of listings, since other hosts write, too
        yield filesystem, name


@contextlib.contextmanager
def as_os_error(path: str) -> Generator[None]:
    """Raise any error of a file system as an `OSError` that contains the path."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror or "", path) from error
        number = next((number for kind, number in ERROR_NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        raise OSError(number, f"{type(error).__name__}: {error}", path) from error


def select_filesystem(path: str) -> FileSystem:
    """Return the file system of a local path or a URL."""
    return RemoteFileSystem() if is_url(path) else FileSystem()

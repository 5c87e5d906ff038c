"""Places that are not on this machine: paths that are URLs, and the calls of a disk on the file systems of fsspec.

```
"s3://bucket/runs/x" -> parse_path() -> RemotePath -> fsspec     looks at what is there
                                     RemoteFileSystem -> fsspec     reads and writes
```

An error of whatever kind that a file system raises is an `OSError` that says of which URL it is.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PosixPath, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, ClassVar, Final, NoReturn, Self

from typing_extensions import override

from ptacc.checkpoint.storage.filesystem import FileSystem
from ptacc.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://(.*)", re.DOTALL)
LOCAL: Final = ("file", "local")
NOTHING: Final = 0
"""The descriptor of a directory: there is nothing to sync."""
NUMBERS: Final[tuple[tuple[type[OSError], int], ...]] = (
    (FileNotFoundError, errno.ENOENT),
    (FileExistsError, errno.EEXIST),
    (NotADirectoryError, errno.ENOTDIR),
    (IsADirectoryError, errno.EISDIR),
    (PermissionError, errno.EACCES),
    (TimeoutError, errno.ETIMEDOUT),
    (OSError, errno.EIO),
)
"""What number an error of each class gets that has none, as those of fsspec's file systems seldom have."""


# ---- paths


def parse_path(place: str | Path) -> Path:
    """Return the path of a place that somebody named: a `RemotePath` for a URL.

    Raises:
        OptionError: It is a URL of no file system that is known or installed, of several, or one that names no place.
    """
    if isinstance(place, Path):
        return checked(place)
    if "::" in place and "://" in place:
        raise OptionError(f"{place!r} is a chain of URLs, and a checkpoint has one place: give a URL without '::'.")
    url = URL.fullmatch(place)
    if url is None:
        return Path(place)
    protocol, rest = url.groups()
    if protocol in LOCAL:
        return local_path(place, rest)
    check_protocol(place, protocol)
    if not rest.strip("/") or rest.startswith("/"):
        raise OptionError(f"{place!r} names no bucket or host: write {protocol}://BUCKET/PATH.")
    path = RemotePath(place)
    if str(path) != place.rstrip("/") or ".." in path.parts:
        raise OptionError(f"{place!r} has an empty name, '.' or '..' in it, which file systems read in different ways.")
    return path


def checked(path: Path) -> Path:
    """Return a path, and refuse one that was made of a URL."""
    first = path.parts[0] if path.parts else ""
    if not isinstance(path, RemotePath) and URL.fullmatch(f"{first}//"):
        from fsspec.registry import known_implementations, registry

        if first[:-1] in {*known_implementations, *registry}:
            raise OptionError(f"{path} was a URL before it was made a Path: give the text {str(RemotePath(path))!r}.")
    return path


def local_path(place: str, rest: str) -> Path:
    """Return the path that a URL of this machine's own files has."""
    if not rest.startswith("/"):
        raise OptionError(f"{place!r} names no place on this machine: write file:///PATH, or the path alone.")
    return Path("/" + rest.lstrip("/"))


def check_protocol(place: str, protocol: str) -> None:
    """Raise `OptionError` for a protocol that fsspec does not know, or whose package is missing."""
    from fsspec.registry import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        raise OptionError(f"{place!r}: fsspec knows no protocol {protocol!r}. Is it misspelt?") from error
    except ImportError as error:
        # The first error says what to install, its cause what was missing.
        raise OptionError(f"{place!r} needs a package that is missing: {error} ({error.__cause__}).") from error


class RemotePath(PosixPath):
    """A path whose first part is a protocol, and that is its URL as text: `RemotePath("s3://bucket") / "runs"`.

    It goes where a `Path` goes. What it does not do through fsspec, it refuses to do: the disk is another place.
    """

    # All of it is in its parts: up to Python 3.11, what derives one path from another hands on nothing else.

    @override
    def __str__(self) -> str:
        """Return the URL."""
        return "//".join([self.parts[0], "/".join(self.parts[1:])]) if self.parts else ""

    @override
    def __eq__(self, other: object) -> bool:
        """Be equal to the same URL, and to no path of this machine."""
        return isinstance(other, RemotePath) and str(self) == str(other)

    @override
    def __hash__(self) -> int:
        return hash(str(self))

    @override
    def is_absolute(self) -> bool:
        """Be one that depends on no working directory."""
        return True

    @override
    def absolute(self) -> Self:
        """Return itself."""
        return self

    @override
    def resolve(self, strict: bool = False) -> Self:
        """Return itself: it leads over no links."""
        return self

    @override
    def as_uri(self) -> str:
        """Return the URL."""
        return str(self)

    # ---- looking

    @override
    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file, or anything below it."""
        return self._kind() is not None

    @override
    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a directory, or anything below it."""
        return self._kind() == "directory"

    @override
    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether there is a file."""
        return self._kind() == "file"

    @override
    def is_symlink(self) -> bool:
        """Be no link."""
        return False

    @override
    def iterdir(self) -> Generator[Self, None, None]:
        """Iterate over what is in the directory."""
        yield from (self / name for name in self.kinds())

    def kinds(self) -> dict[str, bool]:
        """Return the names in the directory, and whether each is one itself, by a single request."""
        with reaching(self):
            system, place = located(self)
            # A console leaves an empty object in the place of a directory, which is listed in itself.
            entries = [entry for entry in system.ls(place, detail=True) if entry["name"].strip("/") != place.strip("/")]
        return {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] == "directory" for entry in entries}

    def _kind(self) -> str | None:
        try:
            with reaching(self):
                system, place = located(self)
                # Not `exists` or `isdir`: where a file system cannot be reached, these say that nothing is there.
                kind: str = system.info(place)["type"]
                return kind
        except (FileNotFoundError, NotADirectoryError):
            return None

    # ---- changing

    @override
    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        """Make an empty file."""
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        with reaching(self):
            system, place = located(self)
            system.pipe_file(place, b"")

    @override
    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file. Not every file system can tell one that was missing."""
        try:
            with reaching(self):
                system, place = located(self)
                system.rm_file(place)
        except FileNotFoundError:
            if not missing_ok:
                raise

    @override
    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a directory, where the file system has such."""
        try:
            with reaching(self):
                system, place = located(self)
                system.mkdir(place, create_parents=parents)
        except FileExistsError:
            if not exist_ok:
                raise

    @override
    def rmdir(self) -> None:
        """Remove an empty directory, where the file system has such."""
        with reaching(self):
            system, place = located(self)
            system.rmdir(place)


def refusing(name: str) -> Callable[..., NoReturn]:
    """Return a method for what a `RemotePath` does not do."""

    def refuse(*arguments: object, **_: object) -> NoReturn:
        which = str(arguments[0]) if arguments else "a URL"
        raise NotImplementedError(f"RemotePath.{name}(): {which} is not on this machine's disk. Use fsspec for this.")

    return refuse


for _name in {*dir(PosixPath)} - {*dir(PurePosixPath)} - {*vars(RemotePath)}:
    if not _name.startswith("_"):
        setattr(RemotePath, _name, refusing(_name))


def located(path: RemotePath) -> tuple[AbstractFileSystem, str]:
    """Return a path's file system, which has forgotten what it knew of it, and the path's name there."""
    from fsspec.core import url_to_fs

    if not URL.fullmatch(str(path)):
        raise ValueError(f"{path} is no URL: an absolute path was put in the place of one")
    system, place = url_to_fs(str(path))
    system.invalidate_cache()  # other hosts write there; not every file system can be told to keep no listings
    return system, place


@contextlib.contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Let whatever a file system raises be an `OSError` that says of what it is."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            number, said = error.errno, error.strerror or ""
        else:
            number = next((number for kind, number in NUMBERS if isinstance(error, kind)), errno.EIO)
            said = f"{type(error).__name__}: {error}"
        raise OSError(number, said, str(path)) from error


# ---- the disk


class RemoteFileSystem(FileSystem):
    """The calls, on a file system of fsspec. What is closed is there, so that there is nothing to sync.

    It is made for object stores, where a file appears when it is closed, and directories are but parts of names.
    """

    damage: ClassVar[type[OSError]] = FileNotFoundError
    """A file that is missing is damage; what cannot be reached may be whole."""
    shows_whole_files: ClassVar[bool] = True
    span: ClassVar[int] = 1 << 25

    def __init__(self) -> None:
        """Start with no file that is open."""
        self._opened: dict[int, tuple[Path, AbstractBufferedFile | BinaryIO]] = {}
        self._numbers = itertools.count(NOTHING + 1)

    @override
    def open_new(self, path: Path) -> int:
        """Open a file to be written, in the place of one that may be there."""
        with reaching(path):
            system, place = located(remote(path))
            file = system.open(place, "wb")
        descriptor = next(self._numbers)
        self._opened[descriptor] = (path, file)
        return descriptor

    @override
    def write(self, descriptor: int, data: memoryview) -> int:
        """Write all of it."""
        path, file = self._opened[descriptor]
        with reaching(path):
            file.write(bytes(data))
        return len(data)

    @override
    def sync(self, descriptor: int) -> None:
        """Do nothing: closing a file is what makes it durable."""

    @override
    def close(self, descriptor: int) -> None:
        """Have a file appear."""
        if descriptor == NOTHING:
            return
        path, file = self._opened[descriptor]
        with reaching(path):
            try:
                file.close()
            except BaseException:
                self.abandon(descriptor)
                raise
        del self._opened[descriptor]

    @override
    def abandon(self, descriptor: int) -> None:
        """Have a file not appear."""
        from fsspec.spec import AbstractBufferedFile

        path, file = self._opened.pop(descriptor)
        with contextlib.suppress(Exception):
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # or what is left of it would be written when it is collected
                file.discard()
            else:  # its file system shows it already
                file.close()
                path.unlink()

    @override
    def is_there(self, path: Path) -> bool:
        """Whether there is anything at a path."""
        return path.exists()

    @override
    @contextlib.contextmanager
    def reading(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file that is there, to be read."""
        with reaching(path):
            system, place = located(remote(path))
            with system.open(place, "rb", cache_type="none") as file:
                yield file

    @override
    def open_directory(self, path: Path) -> int:
        """Open nothing: a directory needs no sync."""
        return NOTHING

    @override
    def make_directory(self, path: Path) -> None:
        """Make a directory, where the file system has such."""
        path.mkdir(exist_ok=True)

    @override
    def remove_file(self, path: Path) -> None:
        """Remove a file, which may be gone: whoever repeats a request cannot know."""
        path.unlink(missing_ok=True)

    @override
    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory, which may be gone with what was in it."""
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()


def remote(path: Path) -> RemotePath:
    """Return a path that has to be remote."""
    assert isinstance(path, RemotePath), f"{path} is on this machine, and {RemoteFileSystem.__name__} is for others"
    return path


def select_filesystem(path: Path) -> FileSystem:
    """Return the disk that a path is on."""
    return RemoteFileSystem() if isinstance(path, RemotePath) else FileSystem()

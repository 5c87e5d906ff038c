"""An object store over a folder of this machine, for fsspec and as strict as the real ones: `objects://bucket/runs/x`.

An object appears whole when it is closed. There is no renaming, and no directory but where an object is below it; what
was listed is kept until it is asked to be forgotten. Several processes may use it: the folder is in the environment.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from fsspec.registry import register_implementation
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from typing_extensions import override

PROTOCOL = "objects"
FOLDER = "PTACC_TEST_OBJECTS"
BUCKET = "bucket"
PART = 100
"""Bytes after which a file that is written sends a part."""

Listener = Callable[[str, str], object]
LISTENERS: list[Listener] = []


class ObjectStore(AbstractFileSystem):
    """The store. Before each request, it calls the listeners with the name of the request and the path."""

    protocol: str | tuple[str, ...] = PROTOCOL

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.listed: dict[str, list[dict[str, Any]]] = {}

    def notify(self, request: str, path: str) -> None:
        for listener in LISTENERS:
            listener(request, path)

    @override
    def invalidate_cache(self, path: str | None = None) -> None:
        super().invalidate_cache(path)
        self.listed.clear()

    @override
    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        self.notify("info", path)
        if object_at(path).exists():
            return {"name": path, "size": object_at(path).stat().st_size, "type": "file"}
        if path == BUCKET or any(key.startswith(f"{path}/") for key in keys()):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    @override
    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        self.notify("ls", path)
        if path not in self.listed:
            below = {key.removeprefix(f"{path}/") for key in keys() if key.startswith(f"{path}/")}
            names = {name.partition("/")[0]: "directory" if "/" in name else "file" for name in sorted(below)}
            self.listed[path] = [{"name": f"{path}/{name}", "size": 0, "type": kind} for name, kind in names.items()]
        if not self.listed[path] and path != BUCKET:
            raise FileNotFoundError(path)
        return self.listed[path] if detail else [entry["name"] for entry in self.listed[path]]

    @override
    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> "Upload | BinaryIO":
        self.notify("open" if mode == "rb" else "create", path)
        if not path.startswith(f"{BUCKET}/"):
            raise FileNotFoundError("The specified bucket does not exist")
        if mode == "rb":
            try:
                return object_at(path).open("rb")
            except FileNotFoundError:
                raise FileNotFoundError(path) from None
        return Upload(self, path, mode, block_size=PART)

    @override
    def rm_file(self, path: str) -> None:
        path = self._strip_protocol(path)
        self.notify("rm_file", path)
        object_at(path).unlink(missing_ok=True)

    @override
    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        path = self._strip_protocol(path)
        self.notify("mkdir", path)
        assert "/" in path, "a bucket would be made"
        if path.partition("/")[0] != BUCKET:
            assert not create_parents, "a bucket would be made"
            raise FileNotFoundError(path)

    @override
    def rmdir(self, path: str) -> None:
        path = self._strip_protocol(path)
        self.notify("rmdir", path)
        assert "/" in path, "a bucket would be removed"
        if any(key.startswith(f"{path}/") for key in keys()):
            raise FileExistsError
        raise FileNotFoundError


class Upload(AbstractBufferedFile):
    """An object that is being written: in parts, of which nothing is seen before the last."""

    def __init__(self, system: ObjectStore, path: str, mode: str, *, block_size: int) -> None:
        super().__init__(system, path, mode, block_size=block_size)
        self.system, self.place = system, path
        self.parts: list[bytes] = []

    @override
    def _upload_chunk(self, final: bool = False) -> None:
        self.system.notify("close" if final else "write", self.place)
        self.parts.append(self.buffer.getvalue())
        if final:
            partial = folder() / f".upload-{secrets.token_hex(8)}"
            partial.write_bytes(b"".join(self.parts))
            partial.replace(object_at(self.place))

    @override
    def discard(self) -> None:
        self.parts.clear()


def folder() -> Path:
    return Path(os.environ[FOLDER])


def object_at(path: str) -> Path:
    """Return the file that holds an object."""
    return folder() / quote(path.removeprefix(f"{PROTOCOL}://"), safe="")


def keys() -> list[str]:
    return [unquote(name) for name in os.listdir(folder()) if not name.startswith(".")]  # noqa: PTH208


@contextmanager
def observed_by(listener: Listener) -> Iterator[None]:
    """Call a listener before each request."""
    LISTENERS.append(listener)
    try:
        yield
    finally:
        LISTENERS.remove(listener)


register_implementation(PROTOCOL, ObjectStore, clobber=True)

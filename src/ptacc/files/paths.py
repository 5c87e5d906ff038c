"""Where a checkpoint is: a local path or the URL of a remote file system, both as a string.

Names in either are separated by "/", so `posixpath` joins and splits both.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Final

from ptacc.errors import OptionError

URL: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://(.*)", re.DOTALL)


def is_url(path: str) -> bool:
    """Whether a parsed path is the URL of a remote file system."""
    return URL.match(path) is not None


def parse_path(path: str | os.PathLike[str]) -> str:
    """Return the local path, or the URL without a slash at its end, that a user gave. `~` is expanded.

    Raises:
        OptionError: The path is empty, the URL is malformed, or its file system is unknown or not installed.
    """
    if isinstance(path, os.PathLike):
        check_not_url(Path(path))
        return expand_path(os.fspath(path))
    if "::" in path and "://" in path:
        raise OptionError(f"{path!r} chains several URLs, but a checkpoint has one location: give a URL without '::'.")
    match = URL.fullmatch(path)
    if match is None:
        return expand_path(path)
    protocol, rest = match.groups()
    if protocol in ("file", "local"):
        if not rest.startswith("/"):
            raise OptionError(f"{path!r} is not an absolute path: write file:///PATH, or the path without a protocol.")
        return str(Path("/" + rest.lstrip("/")))
    check_protocol(path, protocol)
    if not rest.strip("/") or rest.startswith("/"):
        raise OptionError(f"{path!r} has no bucket or host: write {protocol}://BUCKET/PATH.")
    if {"", ".", ".."} & {*rest.rstrip("/").split("/")}:
        raise OptionError(f"{path!r} contains an empty name, '.' or '..', which file systems read in different ways.")
    return path.rstrip("/")


def expand_path(path: str) -> str:
    """Return a local path in which `~` is the home directory."""
    if not path.strip() or "\0" in path:
        raise OptionError(f"{path!r} is not a path: give a name, or '.' for the working directory.")
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise OptionError(f"{path!r}: {error} Write './{path}' for a name that starts with '~'.") from error


def check_not_url(path: Path) -> None:
    """Raise `OptionError` for a `Path` made from a URL: `Path("s3://bucket")` has lost a slash."""
    first, *rest = path.parts or ("",)
    if not URL.fullmatch(f"{first}//"):
        return
    from fsspec.registry import known_implementations, registry

    if first[:-1] in {*known_implementations, *registry}:
        raise OptionError(f"{path} is a Path made from a URL. Give the string {f'{first}//' + '/'.join(rest)!r}.")


def check_protocol(url: str, protocol: str) -> None:
    """Raise `OptionError` for a protocol that fsspec does not know, or whose package is not installed."""
    from fsspec.registry import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ValueError as error:
        raise OptionError(f"{url!r}: fsspec knows no protocol {protocol!r}. Is it misspelt?") from error
    except ImportError as error:
        # The error says what to install; its cause says which module is missing.
        raise OptionError(f"{url!r} needs a package that is not installed: {error} ({error.__cause__}).") from error


def parse_absolute(path: str | os.PathLike[str]) -> str:
    """Return what `parse_path` returns, as a path that does not depend on the working directory."""
    path = parse_path(path)
    return path if is_url(path) else str(Path(path).absolute())


def resolve_links(path: str) -> str:
    """Return a parsed path, absolute and without symbolic links. A checkpoint has the name of its own directory."""
    return path if is_url(path) else os.path.realpath(path)


def split_path(path: str) -> tuple[str, str]:
    """Return the directory and the name of a path."""
    directory, name = posixpath.split(path)
    if is_url(path) and not is_url(directory):
        raise OptionError(f"{path!r} is a bucket or host: write {path}/NAME.")
    return directory or ".", name

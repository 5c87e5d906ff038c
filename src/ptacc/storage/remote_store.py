"""A store on a remote file system, where a directory cannot be renamed and a checkpoint is committed by its manifest.

```
s3://bucket/runs/digits/
  step-00000500/                 a checkpoint, since it has a manifest
  .partial-step-00001000         a mark: without a manifest, this one is being written, or was when its process ended
  step-00001000/
  .removed-step-00000100         a mark: this one is being removed, and is not a checkpoint any more
  step-00000100/
```

A save writes the mark, then each file, the manifest last, and removes the mark. So an interrupted save differs from a
checkpoint that has lost its manifest: the latter has no mark, and is reported as damaged.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from typing_extensions import override

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.files.filesystem import PARTIAL, FileSystem, as_checkpoint_error
from ptacc.files.paths import is_url
from ptacc.files.remote_filesystem import RemoteFileSystem
from ptacc.storage.manifest import FILE_NAME, Manifest
from ptacc.storage.store import MANIFEST, REMOVED, CheckpointStore, PendingCheckpoint, check_name


@dataclass(frozen=True)
class RemoteStore(CheckpointStore):
    """A directory of checkpoints on a file system of fsspec. It writes in another way, and reads in the same."""

    filesystem: FileSystem = field(default_factory=RemoteFileSystem, repr=False)

    @override
    def prepare(self) -> None:
        """Create the directories, but not the bucket: its name may be misspelt."""
        directory, missing = self.directory, list[str]()
        while is_url(parent := posixpath.dirname(directory)):
            if not self.filesystem.is_directory(directory):
                missing.append(directory)
            directory = parent
        for directory in reversed(missing):
            self.filesystem.make_directory(directory)

    @override
    def begin(self, name: str) -> PendingCheckpoint:
        """Begin a checkpoint. A save of the same name that was interrupted is removed."""
        entries = self._list_entries()
        if name in (marks := find_marks(entries)):
            self._resolve_marks(name, marks[name])
        self._check_new(name)
        if not entries:
            self.prepare()
        self.filesystem.write_file(self.locate(f"{PARTIAL}{name}"), [])
        self.filesystem.make_directory(self.locate(name))
        return PendingCheckpoint(name, self.locate(name))

    @override
    def commit(self, pending: PendingCheckpoint, manifest: Manifest) -> Manifest:
        manifest = self._write_manifest(pending, manifest)
        with contextlib.suppress(OSError):  # a mark means nothing once there is a manifest
            self.filesystem.remove_file(self.locate(f"{PARTIAL}{pending.name}"))
        return manifest

    @override
    def discard(self, pending: PendingCheckpoint) -> None:
        """Remove what was written. The mark stays, since other processes may still be writing."""
        self._remove_files(pending.name)

    @override
    def remove(self, name: str) -> None:
        check_name(name)
        self.filesystem.write_file(self.locate(f"{REMOVED}{name}"), [])
        self._resolve_marks(name, {REMOVED})

    @override
    def clean_up(self) -> list[str]:
        marks = find_marks(self._list_entries())
        for name, kinds in marks.items():
            self._resolve_marks(name, kinds)
        return sorted(f"{kind}{name}" for name, kinds in marks.items() for kind in kinds)

    def _resolve_marks(self, name: str, marks: set[str]) -> None:
        if REMOVED in marks or not self._is_committed(name):
            self._remove_files(name)
        for kind in (PARTIAL, REMOVED):
            self.filesystem.remove_file(self.locate(f"{kind}{name}"))

    def _remove_files(self, name: str) -> None:
        self.filesystem.remove_file(self.locate(name, MANIFEST))  # first: from here on it is not a checkpoint
        self.filesystem.remove_tree(self.locate(name))

    @override
    def _list_directories(self) -> list[str]:
        entries = self._list_entries()
        marks = find_marks(entries)
        with as_checkpoint_error(self.directory):
            return sorted(
                name
                for name, is_directory in entries.items()
                if is_directory and (name not in marks or (REMOVED not in marks[name] and self._is_committed(name)))
            )

    def _is_committed(self, name: str) -> bool:
        try:
            self.manifest(name)
        except CheckpointError as error:  # signed with another key or of a later format, it is a checkpoint as well
            return not isinstance(error, DamagedCheckpointError)
        return True


def find_marks(entries: Mapping[str, bool]) -> dict[str, set[str]]:
    """Return the kinds of marks among the entries of a directory, by the name of the checkpoint."""
    marks: dict[str, set[str]] = {}
    for file in sorted(name for name, is_directory in entries.items() if not is_directory):
        for kind in (PARTIAL, REMOVED):
            # Without the check of the name, an object named ".removed-" would mark the store itself for removal.
            if file.startswith(kind) and FILE_NAME.fullmatch(file.removeprefix(kind)):
                marks.setdefault(file.removeprefix(kind), set()).add(kind)
    return marks


def open_store(directory: str | Path, key: bytes | None = None) -> CheckpointStore:
    """Return the store of a local directory or a URL."""
    path = str(directory)
    return RemoteStore(path, key) if is_url(path) else CheckpointStore(path, key)


def open_sibling(store: CheckpointStore, directory: str) -> CheckpointStore:
    """Return the store of another directory with the same key, and the same file system if both are on one."""
    sibling = open_store(directory, store.key)
    return replace(store, directory=directory) if type(sibling) is type(store) else sibling

"""A store on a local file system, where a checkpoint is committed by renaming its directory.

```
runs/digits/
  step-00000500/                 a checkpoint: it has this name only since all of it is durable
    manifest.json                describes it, with the hash of each other file
    model.safetensors  ...
  .partial-step-00001000-7f3a/   is being written, or was when its process ended; the next start removes it
  .removed-step-00000100-02c9/   is being removed
```

A save writes and syncs each file, the manifest last, in a directory with a temporary name. Then it syncs that
directory, renames it, and syncs the parent.
"""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import override

from ptacc.checkpoint.storage.filesystem import PARTIAL, as_checkpoint_error
from ptacc.checkpoint.storage.local_filesystem import LocalFileSystem
from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.storage.store import REMOVED, CheckpointStore, PendingCheckpoint, check_name


@dataclass(frozen=True)
class LocalStore(CheckpointStore):
    """A directory of checkpoints on a local file system."""

    filesystem: LocalFileSystem = field(default_factory=LocalFileSystem, kw_only=True, repr=False)

    @override
    def prepare(self) -> None:
        self._make_durable_directory(Path(self.directory))

    def _make_durable_directory(self, directory: Path) -> None:
        if not self.filesystem.is_directory(str(directory)):
            self._make_durable_directory(directory.parent)
            self.filesystem.make_directory(str(directory))
            self.filesystem.sync_directory(str(directory.parent))
            return
        # A process may have been killed after it created the directory and before it synced the parent. A parent that
        # cannot be read was not created by a run.
        with contextlib.suppress(PermissionError):
            self.filesystem.sync_directory(str(directory.parent))

    @override
    def begin(self, name: str) -> PendingCheckpoint:
        check_name(name)
        self._check_free(name)
        if not self.filesystem.is_directory(self.directory):
            self.prepare()
        pending = PendingCheckpoint(name, self._make_temporary_name(PARTIAL, name))
        self.filesystem.make_directory(pending.path)
        return pending

    @override
    def commit(self, pending: PendingCheckpoint, manifest: Manifest) -> Manifest:
        manifest = self._write_manifest(pending, manifest)
        self.filesystem.sync_directory(pending.path)
        self._rename(pending.path, self.locate(pending.name))
        return manifest

    @override
    def discard(self, pending: PendingCheckpoint) -> None:
        self.filesystem.remove_tree(pending.path)

    @override
    def remove(self, name: str) -> None:
        check_name(name)
        trash = self._make_temporary_name(REMOVED, name)
        self._rename(self.locate(name), trash)
        self.filesystem.remove_tree(trash)

    @override
    def clean_up(self) -> list[str]:
        leftovers = [name for name in self._list_directories() if name.startswith((PARTIAL, REMOVED))]
        with as_checkpoint_error(self.directory):
            for name in leftovers:
                self.filesystem.remove_tree(self.locate(name))
        return leftovers

    def _make_temporary_name(self, prefix: str, name: str) -> str:
        return self.locate(f"{prefix}{name}-{secrets.token_hex(4)}")

    def _rename(self, source: str, target: str) -> None:
        self.filesystem.rename(source, target)
        self.filesystem.sync_directory(self.directory)

    @override
    def _list_directories(self) -> list[str]:
        with as_checkpoint_error(self.directory):
            entries = self.filesystem.list_directory(self.directory)
        return sorted(name for name, is_directory in entries.items() if is_directory)

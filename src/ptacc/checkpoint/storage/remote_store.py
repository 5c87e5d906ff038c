"""The store on another machine: a directory of checkpoints where no directory can be given another name.

```
s3://bucket/runs/digits/
  step-00000500/                 a checkpoint, for it has a manifest
  .partial-step-00001000         a mark: what has no manifest is being written, or was when the process ended
  step-00001000/
  .removed-step-00000100         a mark: this is being removed, and no longer a checkpoint
  step-00000100/
```

A save puts the mark, writes each file in its place, the manifest last, which makes it a checkpoint, and takes the mark
away. So what a save has left is told from a checkpoint whose manifest was lost: that one has no mark, and is damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from typing_extensions import override

from ptacc.checkpoint.storage.filesystem import PARTIAL, FileSystem, as_checkpoint_error, remove_tree, write_file
from ptacc.checkpoint.storage.manifest import FILE_NAME, Manifest
from ptacc.checkpoint.storage.remote_filesystem import RemoteFileSystem, RemotePath
from ptacc.checkpoint.storage.store import MANIFEST, REMOVED, CheckpointStore, PendingCheckpoint, check_name
from ptacc.errors import CheckpointError, DamagedCheckpointError

SAYS: Mapping[str, str] = {
    PARTIAL: "{name} is being saved, and no checkpoint until it has a manifest: a run that starts removes it.\n",
    REMOVED: "{name} is being removed: a run that starts removes what is left of it.\n",
}
"""What stands in the marks, for people."""


@dataclass(frozen=True)
class RemoteStore(CheckpointStore):
    """A directory of checkpoints on a file system of fsspec."""

    disk: FileSystem = field(default_factory=RemoteFileSystem, repr=False)

    # ---- writing

    @override
    def prepare(self) -> None:
        """Make the directories, where there are such. A bucket is never made: its name may be misspelt."""
        above = [path for path in (self.directory, *self.directory.parents) if len(path.parts) > 2]
        missing = [path for path in above if not path.is_dir()]
        for path in reversed(missing):
            self.disk.make_directory(path)

    @override
    def begin(self, name: str) -> PendingCheckpoint:
        """Begin a checkpoint, where another of its name may have been begun and not ended."""
        check_name(name)
        listing = self._listing()
        if name in (marks := marks_in(listing)):
            self._settle(name, marks[name])
        self._check_free(name)
        if not listing:
            self.prepare()
        self._mark(PARTIAL, name)
        self.disk.make_directory(self.directory / name)
        return PendingCheckpoint(name, self.directory / name)

    @override
    def commit(self, draft: PendingCheckpoint, manifest: Manifest) -> Manifest:
        """Make a checkpoint of what was written, by its manifest."""
        manifest = self._numbered(draft, manifest)
        write_file(self.disk, draft.path / MANIFEST, [manifest.to_bytes(self.key)])
        with contextlib.suppress(OSError):  # a mark beside a manifest means nothing
            self.disk.remove_file(self.directory / f"{PARTIAL}{draft.name}")
        return manifest

    @override
    def discard(self, draft: PendingCheckpoint) -> None:
        """Remove what was written. The mark stays, for what other processes may still write."""
        self._clear(draft.name)

    @override
    def remove(self, name: str) -> None:
        """Remove a checkpoint: from its mark on it is none."""
        check_name(name)
        self._mark(REMOVED, name)
        self._clear(name)
        self._unmark(name)

    @override
    def clean_up(self) -> list[str]:
        """Bring to an end what processes left that ended in a save or a removal, and return the names of the marks."""
        marks = marks_in(self._listing())
        with as_checkpoint_error(self.directory):
            for name, kinds in marks.items():
                self._settle(name, kinds)
        return sorted(f"{kind}{name}" for name, kinds in marks.items() for kind in kinds)

    def _settle(self, name: str, marks: set[str]) -> None:
        if REMOVED in marks or not self._is_committed(name):
            self._clear(name)
        self._unmark(name)

    def _clear(self, name: str) -> None:
        """Remove what there is of a checkpoint: first the manifest, so that none is ever there in part."""
        path = self.directory / name
        self.disk.remove_file(path / MANIFEST)
        if path.exists():
            remove_tree(self.disk, path)

    def _mark(self, kind: str, name: str) -> None:
        write_file(self.disk, self.directory / f"{kind}{name}", [SAYS[kind].format(name=name).encode()])

    def _unmark(self, name: str) -> None:
        for kind in (PARTIAL, REMOVED):
            self.disk.remove_file(self.directory / f"{kind}{name}")

    # ---- reading

    @override
    def _directories(self) -> list[str]:
        """Return the names of the directories that are there, but for those of which a mark says that they are none."""
        listing = self._listing()
        marks = marks_in(listing)
        with as_checkpoint_error(self.directory):
            return sorted(
                name
                for name, is_directory in listing.items()
                if is_directory and (name not in marks or (REMOVED not in marks[name] and self._is_committed(name)))
            )

    def _is_committed(self, name: str) -> bool:
        try:
            self.manifest(name)
        except DamagedCheckpointError:
            return False
        except CheckpointError:  # of another key, or of a later format
            return True
        return True

    def _listing(self) -> dict[str, bool]:
        assert isinstance(self.directory, RemotePath)
        with as_checkpoint_error(self.directory), contextlib.suppress(FileNotFoundError):
            return self.directory.kinds()
        return {}


def marks_in(listing: Mapping[str, bool]) -> dict[str, set[str]]:
    """Return what marks a directory has for which names."""
    marks: dict[str, set[str]] = {}
    for file in sorted(name for name, is_directory in listing.items() if not is_directory):
        for kind in (PARTIAL, REMOVED):
            # What is marked may be removed, and an object whose name ends with its kind would mark the whole directory.
            if file.startswith(kind) and FILE_NAME.fullmatch(file.removeprefix(kind)):
                marks.setdefault(file.removeprefix(kind), set()).add(kind)
    return marks


def store_at(directory: Path, key: bytes | None = None) -> CheckpointStore:
    """Return the store of a directory, wherever that is."""
    return (RemoteStore if isinstance(directory, RemotePath) else CheckpointStore)(directory, key)


def store_beside(store: CheckpointStore, directory: Path) -> CheckpointStore:
    """Return the store of another directory, with the key of this one; with its disk, if both are on it."""
    other = store_at(directory, store.key)
    same = isinstance(directory, RemotePath) == isinstance(store.directory, RemotePath)
    return replace(other, disk=store.disk) if same else other

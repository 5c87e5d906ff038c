"""The store: a directory of checkpoints, of which each is there whole or not at all.

```
runs/digits/
  step-00000500/                 a checkpoint: it has its name only since everything in it is on the disk
    manifest.json                what it is, and the hash of each other file
    model.safetensors  ...
  .partial-step-00001000-7f3a/   one that is being written, or was when the process ended: swept at the next start
```

A save writes and syncs each file beside the target, the manifest last, syncs that directory, renames it, and syncs
the parent. Reading checks the manifest, then a file's hash, and parses it only then.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from ptacc.checkpoint.storage.filesystem import (
    PARTIAL,
    FileSystem,
    Written,
    as_checkpoint_error,
    hash_file,
    read_at_most,
    read_file,
    remove_tree,
    sync_directory,
    write_file,
)
from ptacc.checkpoint.storage.manifest import FILE_NAME, LARGEST, Manifest, is_count
from ptacc.errors import CheckpointError, DamagedCheckpointError, OptionError

MANIFEST = "manifest.json"
PREFIX = "step-"
"""How the names of a run's checkpoints begin; users may save others under names of their own."""
REMOVED = ".removed-"


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written.

    Args:
        name: What it will be called.
        path: Where it is meanwhile.
    """

    name: str
    path: Path


@dataclass(frozen=True)
class CheckpointStore:
    """A directory of checkpoints.

    Args:
        directory: Where they are; made at the first save.
        key: Signs them; those that it did not sign are refused.
        disk: What writes.
    """

    directory: Path
    key: bytes | None = field(default=None, repr=False)
    disk: FileSystem = field(default_factory=FileSystem, repr=False)

    def __post_init__(self) -> None:
        if self.key == b"":
            raise OptionError(
                "CheckpointStore(key=b''): what everybody has signs nothing, so it needs a key of at least one byte. "
                "Is what it is read from empty?"
            )

    # ---- writing

    def free_name(self, step: int) -> str:
        """Return a name for a checkpoint at a step that no other has: there is more than one where a run went back."""
        name = f"{PREFIX}{step:08}"
        again = (f"{name}.{number:02}" for number in range(1, 10_000))
        with as_checkpoint_error(self.directory):
            return next(free for free in chain([name], again) if not (self.directory / free).exists())

    def prepare(self) -> None:
        """Make the directory, if there is none, and its name durable."""
        self._make_durably(self.directory)

    def begin(self, name: str) -> PendingCheckpoint:
        """Begin a checkpoint. One process does this, and tells the others where.

        Raises:
            CheckpointError: There is one of this name already.
        """
        check_name(name)
        self._check_free(name)
        draft = PendingCheckpoint(name, self.directory / f"{PARTIAL}{name}-{secrets.token_hex(4)}")
        if not self.directory.is_dir():
            self.prepare()
        self.disk.make_directory(draft.path)
        return draft

    def write(self, draft: PendingCheckpoint, file: str, parts: Iterable[bytes | memoryview]) -> Written:
        """Write one file of a checkpoint durably. Any process does this."""
        if not FILE_NAME.fullmatch(file) or file == MANIFEST:
            raise CheckpointError(f"{file!r} is no name for a file of a checkpoint.")
        return write_file(self.disk, draft.path / file, parts)

    def commit(self, draft: PendingCheckpoint, manifest: Manifest) -> Manifest:
        """Make a checkpoint of what was written: from here on it is there, whatever happens. One process does this.

        Args:
            draft: What was begun.
            manifest: What it is, with the hashes of all files that all processes wrote.
        """
        manifest = self._numbered(draft, manifest)
        write_file(self.disk, draft.path / MANIFEST, [manifest.to_bytes(self.key)])
        sync_directory(self.disk, draft.path)
        self.disk.rename(draft.path, self.directory / draft.name)
        sync_directory(self.disk, self.directory)
        return manifest

    def discard(self, draft: PendingCheckpoint) -> None:
        """Remove what was written of a checkpoint that will not be."""
        if draft.path.exists():
            remove_tree(self.disk, draft.path)

    def remove(self, name: str) -> None:
        """Remove a checkpoint: first its name, so that none is ever there in part.

        Raises:
            CheckpointError: It is no name that a checkpoint may have.
        """
        check_name(name)
        grave = self.directory / f"{REMOVED}{name}-{secrets.token_hex(4)}"
        self.disk.rename(self.directory / name, grave)
        sync_directory(self.disk, self.directory)
        remove_tree(self.disk, grave)

    def clean_up(self) -> list[str]:
        """Remove what processes left that ended in a save or a removal, and return the names of that."""
        left = [name for name in self._directories() if name.startswith((PARTIAL, REMOVED))]
        with as_checkpoint_error(self.directory):
            for name in left:
                remove_tree(self.disk, self.directory / name)
        return left

    def _check_free(self, name: str) -> None:
        if self.disk.is_there(self.directory / name):
            raise CheckpointError(f"{self.directory / name} exists already, and a checkpoint is never written over.")

    def _numbered(self, draft: PendingCheckpoint, manifest: Manifest) -> Manifest:
        """Return a manifest with its name, and the number after those that are there."""
        there = self.manifests()
        sequence = 1 + (there[-1].sequence if there else 0)
        if not is_count(sequence):
            last = self.directory / there[-1].name
            raise CheckpointError(f"{last} has the highest number there is, so none can come after it.")
        return replace(manifest, name=draft.name, sequence=sequence)

    def _make_durably(self, directory: Path) -> None:
        if not directory.is_dir():
            self._make_durably(directory.parent)
            self.disk.make_directory(directory)
            sync_directory(self.disk, directory.parent)
            return
        # A process that was killed may have made it, and not synced it. Where its parent cannot be read, it was given.
        with contextlib.suppress(PermissionError):
            sync_directory(self.disk, directory.parent)

    # ---- reading

    def names(self) -> list[str]:
        """Return the names of the run's checkpoints that seem to be there, in the order of names."""
        return [name for name in self._directories() if name.startswith(PREFIX)]

    def others(self) -> list[str]:
        """Return the names of the checkpoints that were saved under names of their own, in the order of names."""
        others = [name for name in self._directories() if not name.startswith((".", PREFIX))]
        with as_checkpoint_error(self.directory):
            return [name for name in others if (self.directory / name / MANIFEST).exists()]

    def manifests(self) -> list[Manifest]:
        """Return the manifests that can be read, in the order in which they were saved; no other file is looked at."""
        found: list[Manifest] = []
        for name in self.names():
            with contextlib.suppress(CheckpointError):
                found.append(self.manifest(name))
        return sorted(found, key=lambda manifest: manifest.sequence)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a checkpoint, checked by itself.

        Raises:
            DamagedCheckpointError: It is missing, damaged, or of another checkpoint.
            CheckpointError: It is of a later format, or not signed with the key.
        """
        path = self.directory / name / MANIFEST
        if not FILE_NAME.fullmatch(name) or not self.disk.is_there(path):
            raise DamagedCheckpointError(f"{name!r} in {self.directory} is no checkpoint: it has no manifest.")
        try:
            manifest = Manifest.from_bytes(read_at_most(self.disk, path, LARGEST), self.key)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{path}: {error}") from error
        if manifest.name != name:
            raise DamagedCheckpointError(f"{path} is the manifest of {manifest.name}: its directory was renamed.")
        return manifest

    def read(self, manifest: Manifest, file: str) -> bytes:
        """Return the bytes of a file, after their hash was checked.

        Raises:
            DamagedCheckpointError: It is missing, or not what was written.
        """
        path = self.directory / manifest.name / file
        if file not in manifest.files:
            raise DamagedCheckpointError(f"{path} is not in the manifest.")
        data = read_file(self.disk, path, manifest.files[file].size)
        check_hash(path, hashlib.sha256(data).hexdigest(), manifest.files[file])
        return data

    def verify(self, name: str) -> Manifest:
        """Check every file of a checkpoint, and that there is no other; return its manifest.

        Raises:
            DamagedCheckpointError: A file is missing, is not what was written, or does not belong there.
        """
        manifest = self.manifest(name)
        for file, written in manifest.files.items():
            path = self.directory / name / file
            check_hash(path, hash_file(self.disk, path, written.size), written)
        there = {path.name for path in (self.directory / name).iterdir()}
        if odd := there - {*manifest.files, MANIFEST}:
            raise DamagedCheckpointError(f"{min(odd)!r} in {self.directory / name} does not belong to the checkpoint.")
        return manifest

    def verified(self) -> Iterator[tuple[str, Manifest | CheckpointError]]:
        """Iterate over the checkpoints, the newest first: each with its manifest, or with what is wrong with it.

        Where a manifest cannot be read, nobody knows how new its checkpoint is; those come before all others.
        """
        by_age = [manifest.name for manifest in self.manifests()]
        unknown = [name for name in self.names() if name not in by_age]
        for name in reversed([*by_age, *unknown]):
            try:
                yield name, self.verify(name)
            except CheckpointError as error:
                yield name, error

    def newest(self) -> tuple[Manifest | None, Mapping[str, CheckpointError]]:
        """Return the newest checkpoint that is whole, None if there is none, and what was wrong with newer ones."""
        passed_over: dict[str, CheckpointError] = {}
        for name, found in self.verified():
            if isinstance(found, Manifest):
                return found, passed_over
            passed_over[name] = found
        return None, passed_over

    def _directories(self) -> list[str]:
        """Return the names of the directories that are there, in their order."""
        with as_checkpoint_error(self.directory):
            if not self.directory.is_dir():
                return []
            return sorted(path.name for path in self.directory.iterdir() if path.is_dir() and not path.is_symlink())


def check_name(name: str) -> None:
    """Raise `CheckpointError` for a name that no checkpoint may have."""
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is no name for a checkpoint: letters, digits, `-`, `_` and `.` make one.")


def check_hash(path: Path, sha256: str, written: Written) -> None:
    """Raise `DamagedCheckpointError` for a file that is not what was written."""
    if sha256 != written.sha256:
        raise DamagedCheckpointError(f"{path} is not what was written: its hash differs.")

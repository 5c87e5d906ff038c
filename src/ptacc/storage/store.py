"""The store: a directory of checkpoints, each of which is either complete or not there.

```
runs/digits/
  step-00000500/                 a checkpoint: it has this name only since all of it is durable
    manifest.json                describes it, with the hash of each other file
    model.safetensors  ...
  .partial-step-00001000-7f3a/   is being written, or was when its process ended; the next start removes it
  .removed-step-00000100-02c9/   is being removed
```

A save writes and syncs each file, the manifest last, in a directory with a temporary name. Then it syncs that
directory, renames it, and syncs the parent. Before a file is parsed, the manifest and the hash of the file are checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from pathlib import Path

from ptacc.errors import CheckpointError, DamagedCheckpointError, OptionError
from ptacc.files.filesystem import PARTIAL, FileDigest, FileSystem, as_checkpoint_error
from ptacc.storage.manifest import FILE_NAME, MAX_MANIFEST_SIZE, Manifest

MANIFEST = "manifest.json"
PREFIX = "step-"
"""Prefix of the checkpoint names that a run chooses; users save others under names of their own."""
REMOVED = ".removed-"
"""Prefix of what marks a checkpoint that is being removed."""


@dataclass(frozen=True)
class PendingCheckpoint:
    """A checkpoint that is being written: its final name, and the directory that it is written to."""

    name: str
    path: str


@dataclass(frozen=True)
class CheckpointStore:
    """A directory of checkpoints on the local file system.

    Args:
        directory: A path, which is created when the first checkpoint is saved.
        key: Signs checkpoints; those that are not signed with it are refused.
    """

    directory: str
    key: bytes | None = field(default=None, repr=False)
    filesystem: FileSystem = field(default_factory=FileSystem, repr=False)

    def __post_init__(self) -> None:
        if self.key == b"":
            raise OptionError("The checkpoint key is empty (b''): give at least one byte. Is its source empty?")

    def locate(self, *names: str) -> str:
        """Return the path of a checkpoint, or of a file in one."""
        return posixpath.join(self.directory, *names)

    # ---- writing

    def prepare(self) -> None:
        """Create the directory, durably, unless it exists."""
        path = Path(self.directory)
        missing = list(takewhile(lambda path: not self.filesystem.is_directory(str(path)), [path, *path.parents]))
        existing = missing[-1].parent if missing else path
        # A run may have created it, and been killed before the sync. It did not where the parent cannot be read.
        with contextlib.suppress(PermissionError):
            self.filesystem.sync_directory(str(existing.parent))
        for path in reversed(missing):
            self.filesystem.make_directory(str(path))
            self.filesystem.sync_directory(str(path.parent))

    def begin(self, name: str) -> PendingCheckpoint:
        """Begin to write a checkpoint with a new name. Called on one rank, which broadcasts the result."""
        self._check_new(name)
        if not self.filesystem.is_directory(self.directory):
            self.prepare()
        pending = PendingCheckpoint(name, self._make_temporary_name(PARTIAL, name))
        self.filesystem.make_directory(pending.path)
        return pending

    def write(self, pending: PendingCheckpoint, file: str, parts: Iterable[bytes | memoryview]) -> FileDigest:
        """Write one file of a checkpoint durably. Any rank may call this."""
        if not FILE_NAME.fullmatch(file) or file == MANIFEST:
            raise CheckpointError(f"{file!r} is not a valid name for a file of a checkpoint.")
        return self.filesystem.write_file(f"{pending.path}/{file}", parts)

    def commit(self, pending: PendingCheckpoint, manifest: Manifest) -> Manifest:
        """Turn the files written so far into a checkpoint, atomically and durably. Return its complete manifest."""
        manifest = self._write_manifest(pending, manifest)
        self.filesystem.sync_directory(pending.path)
        self._rename(pending.path, self.locate(pending.name))
        return manifest

    def discard(self, pending: PendingCheckpoint) -> None:
        """Remove the files of a checkpoint that will not be committed."""
        self.filesystem.remove_tree(pending.path)

    def remove(self, name: str) -> None:
        """Remove a checkpoint. If the process is killed in between, the rest is not a checkpoint any more."""
        check_name(name)
        trash = self._make_temporary_name(REMOVED, name)
        self._rename(self.locate(name), trash)
        self.filesystem.remove_tree(trash)

    def clean_up(self) -> list[str]:
        """Remove what is left of interrupted saves and removals, and return the names of the leftovers."""
        leftovers = [name for name in self._list_directories() if name.startswith((PARTIAL, REMOVED))]
        for name in leftovers:
            self.filesystem.remove_tree(self.locate(name))
        return leftovers

    def free_name(self, step: int) -> str:
        """Return an unused name for a checkpoint at a step. A run that was resumed earlier may have saved this step."""
        name = f"{PREFIX}{step:08}"
        candidates = chain([name], (f"{name}.{number:02}" for number in range(1, 10_000)))
        return next(name for name in candidates if not self.filesystem.exists(self.locate(name)))

    def _write_manifest(self, pending: PendingCheckpoint, manifest: Manifest) -> Manifest:
        manifests = self.manifests()
        sequence = manifests[-1].sequence + 1 if manifests else 1
        manifest = replace(manifest, name=pending.name, sequence=sequence)
        self.filesystem.write_file(f"{pending.path}/{MANIFEST}", [manifest.to_bytes(self.key)])
        return manifest

    def _check_new(self, name: str) -> None:
        check_name(name)
        if self.filesystem.exists(self.locate(name)):
            raise CheckpointError(f"{self.locate(name)} exists already: a checkpoint is never overwritten.")

    def _make_temporary_name(self, prefix: str, name: str) -> str:
        return self.locate(f"{prefix}{name}-{secrets.token_hex(4)}")

    def _rename(self, source: str, target: str) -> None:
        self.filesystem.rename(source, target)
        self.filesystem.sync_directory(self.directory)

    # ---- reading

    def _list_directories(self) -> list[str]:
        """Return the sorted names of the directories in the store."""
        return sorted(name for name, is_directory in self._list_entries().items() if is_directory)

    def _list_entries(self) -> dict[str, bool]:
        with as_checkpoint_error(self.directory):
            return self.filesystem.list_directory(self.directory)

    def names(self) -> list[str]:
        """Return the names of the run's checkpoints in alphabetical order, without reading them."""
        return [name for name in self._list_directories() if name.startswith(PREFIX)]

    def custom_names(self) -> list[str]:
        """Return the names of the checkpoints that users saved under a name of their own, in alphabetical order."""
        names = [name for name in self._list_directories() if not name.startswith((".", PREFIX))]
        return [name for name in names if self.filesystem.exists(self.locate(name, MANIFEST))]

    def manifests(self) -> list[Manifest]:
        """Return the valid manifests of the run's checkpoints, oldest first. No other file is read."""
        found: list[Manifest] = []
        for name in self.names():
            with contextlib.suppress(CheckpointError):
                found.append(self.manifest(name))
        return sorted(found, key=lambda manifest: manifest.sequence)

    def manifest(self, name: str) -> Manifest:
        """Read and check the manifest of a checkpoint.

        Raises:
            DamagedCheckpointError: It is missing, damaged, or belongs to another checkpoint.
            CheckpointError: It has a later format, or is not signed with the key.
        """
        path = self.locate(name, MANIFEST)
        if not FILE_NAME.fullmatch(name) or not self.filesystem.exists(path):
            raise DamagedCheckpointError(f"{name!r} in {self.directory} is not a checkpoint: it has no manifest.")
        try:
            manifest = Manifest.from_bytes(self.filesystem.read_at_most(path, MAX_MANIFEST_SIZE), self.key)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{path}: {error}") from error
        if manifest.name != name:
            raise DamagedCheckpointError(f"{path} is the manifest of {manifest.name}: its directory was renamed.")
        return manifest

    def read(self, manifest: Manifest, file: str) -> bytes:
        """Read a file and check its hash. Raise `DamagedCheckpointError` if it is missing or has changed."""
        path = self.locate(manifest.name, file)
        if file not in manifest.files:
            raise DamagedCheckpointError(f"{path} is not in the manifest.")
        digest = manifest.files[file]
        data = self.filesystem.read_file(path, digest.size)
        check_hash(path, hashlib.sha256(data).hexdigest(), digest)
        return data

    def verify(self, name: str, *, hashes: bool = True) -> Manifest:
        """Check every file of a checkpoint, by its hash or only its size, and that there are no others.

        Return its manifest, or raise as `manifest` does.
        """
        manifest = self.manifest(name)
        for file, digest in manifest.files.items():
            path = self.locate(name, file)
            if hashes:
                check_hash(path, self.filesystem.hash_file(path, digest.size), digest)
            else:
                self.filesystem.check_size(path, digest.size)
        unexpected = self.filesystem.list_directory(self.locate(name)).keys() - {*manifest.files, MANIFEST}
        if unexpected:
            raise DamagedCheckpointError(f"{self.locate(name)} contains {min(unexpected)!r}, which is not part of it.")
        return manifest

    def verified(self) -> Iterator[tuple[str, Manifest | CheckpointError]]:
        """Verify the run's checkpoints, newest first: yield each with its manifest or what is wrong with it."""
        by_age = [manifest.name for manifest in self.manifests()]
        unknown = [name for name in self.names() if name not in by_age]
        for name in reversed([*by_age, *unknown]):  # one without a valid manifest may be the newest
            try:
                yield name, self.verify(name)
            except CheckpointError as error:
                yield name, error

    def newest(self) -> tuple[Manifest | None, Mapping[str, CheckpointError]]:
        """Return the newest intact checkpoint, or None, and what is wrong with those that are newer."""
        skipped: dict[str, CheckpointError] = {}
        for name, found in self.verified():
            if isinstance(found, Manifest):
                return found, skipped
            skipped[name] = found
        return None, skipped


def check_name(name: str) -> None:
    """Raise `CheckpointError` for an invalid name of a checkpoint."""
    if not FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} is not a valid checkpoint name: use letters, digits, '-', '_' and '.'.")


def check_hash(path: str, sha256: str, written: FileDigest) -> None:
    """Raise `DamagedCheckpointError` for a file whose content has changed."""
    if sha256 != written.sha256:
        raise DamagedCheckpointError(f"{path} has changed since it was written: its hash differs.")

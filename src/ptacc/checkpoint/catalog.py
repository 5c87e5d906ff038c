"""The checkpoints in a directory and in those of a trainer's later runs, and what is wrong with any of them.

```
runs/digits/
  step-00000500/
  best/                 saved under a name of the user's
  run-2/                the second run of the same trainer
    step-00000500/
```
"""

from __future__ import annotations

import math
import posixpath
import re
from dataclasses import dataclass, replace

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.files.paths import resolve_links, split_path
from ptacc.files.remote_filesystem import select_filesystem
from ptacc.storage.manifest import Manifest
from ptacc.storage.remote_store import open_store
from ptacc.storage.store import MANIFEST, PREFIX, CheckpointStore


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint in a listing.

    Args:
        name: Its name in the store.
        title: Its name in the listing.
        manifest: None if it cannot be read.
        problem: What is wrong with it; empty if no problem is known.
    """

    store: CheckpointStore
    name: str
    title: str
    manifest: Manifest | None = None
    problem: str = ""

    @property
    def is_gone(self) -> bool:
        """Whether it has been removed since it was listed, as a run in progress removes its old checkpoints."""
        return bool(self.problem) and not self.store.filesystem.is_directory(self.store.locate(self.name))

    def check(self, *, files: bool) -> CheckpointEntry:
        """Return the entry with its manifest, or with what is wrong with that or, if asked for, with its files."""
        try:
            manifest = self.store.verify(self.name) if files else self.store.manifest(self.name)
        except (CheckpointError, OSError) as error:
            # A checkpoint with another key or a later format is refused without being damaged.
            kind = "damaged" if isinstance(error, DamagedCheckpointError) else "refused"
            return replace(self, problem=f"{kind}: {error}")
        return replace(self, manifest=manifest, problem="")


def list_checkpoints(directory: str, key: bytes | None) -> list[CheckpointEntry]:
    """Return the checkpoint that a directory is, or those of all runs in it, oldest first."""
    if entry := find_checkpoint(directory, key):
        return [entry]
    filesystem = select_filesystem(directory)
    matches = (re.fullmatch(r"run-([2-9]|[1-9][0-9]+)", name) for name in filesystem.list_directory(directory))
    runs = sorted(int(match[1]) for match in matches if match)
    entries = list_run(open_store(directory, key), "")
    for run in runs:
        entries += list_run(open_store(f"{directory}/run-{run}", key), f"run-{run}/")
    return entries


def find_checkpoint(directory: str, key: bytes | None) -> CheckpointEntry | None:
    """Return the checkpoint that a directory is, None if it is not a checkpoint."""
    path = resolve_links(directory)
    filesystem = select_filesystem(path)
    if not filesystem.exists(f"{path}/{MANIFEST}"):
        # A checkpoint without its manifest still has its name and its files, and no directories.
        is_directory = posixpath.basename(path).startswith(PREFIX) and filesystem.is_directory(path)
        if not is_directory or any(filesystem.list_directory(path).values()):
            return None
    parent, name = split_path(path)
    return CheckpointEntry(open_store(parent, key), name, directory).check(files=False)


def list_run(store: CheckpointStore, prefix: str) -> list[CheckpointEntry]:
    """Return the checkpoints of one run, oldest first, then those of unknown age."""
    names = sorted([*store.names(), *store.custom_names()])
    entries = [CheckpointEntry(store, name, f"{prefix}{name}").check(files=False) for name in names]
    remaining = [entry for entry in entries if not entry.is_gone]
    return sorted(remaining, key=lambda entry: entry.manifest.sequence if entry.manifest else math.inf)

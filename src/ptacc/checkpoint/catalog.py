"""What checkpoints there are in a directory, in those of a trainer's later runs, and what is wrong with any of them.

```
runs/digits/
  step-00000500/
  best/                 saved under a name of its own
  run-2/                the second run of the same trainer
    step-00000500/
```
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.storage.remote_store import store_at
from ptacc.checkpoint.storage.store import MANIFEST, PREFIX, CheckpointStore
from ptacc.errors import CheckpointError, DamagedCheckpointError

LATER_RUN = re.compile(r"run-([2-9]|[1-9][0-9]+)")


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint as it was found.

    Args:
        store: What it is in.
        name: What the store calls it.
        place: What it is called where it was looked for.
        manifest: None where it cannot be read.
        problem: What is wrong with it; empty if nothing is known to be.
    """

    store: CheckpointStore
    name: str
    place: str
    manifest: Manifest | None = None
    problem: str = ""

    @property
    def is_gone(self) -> bool:
        """Whether it was removed since it was found: a run that goes on removes its old ones."""
        return bool(self.problem) and not (self.store.directory / self.name).is_dir()

    def looked_at(self) -> CheckpointEntry:
        """Return it with its manifest, or with what is wrong with that."""
        try:
            return replace(self, manifest=self.store.manifest(self.name))
        except (CheckpointError, OSError) as error:
            return replace(self, problem=describe_problem(error))

    def verified(self) -> CheckpointEntry:
        """Return it with what is wrong with any of its files, having read them all."""
        try:
            return replace(self, manifest=self.store.verify(self.name), problem="")
        except (CheckpointError, OSError) as error:
            return replace(self, problem=describe_problem(error))


def describe_problem(error: CheckpointError | OSError) -> str:
    """Say what is wrong with a checkpoint: another key, or a later format, is no damage."""
    return f"{'damaged' if isinstance(error, DamagedCheckpointError) else 'refused'}: {error}"


def found_at(directory: Path, key: bytes | None) -> list[CheckpointEntry]:
    """Return the one checkpoint that a directory is, or those of all runs in it, the oldest first.

    Args:
        directory: Where to look.
        key: What they have to be signed with, if given.
    """
    if itself := found_itself(directory, key):
        return [itself]
    if not directory.is_dir():
        return []
    matches = [(LATER_RUN.fullmatch(entry.name), entry) for entry in directory.iterdir()]
    later = sorted((int(match[1]), entry) for match, entry in matches if match and entry.is_dir())
    found = found_in(store_at(directory, key), "")
    for _, entry in later:
        found += found_in(store_at(entry, key), f"{entry.name}/")
    return found


def found_itself(directory: Path, key: bytes | None) -> CheckpointEntry | None:
    """Return the checkpoint that a directory is: None for a directory of checkpoints, or of anything else."""
    path = directory.resolve()
    is_named_so = path.name.startswith(PREFIX) and path.is_dir() and not any(entry.is_dir() for entry in path.iterdir())
    if (path / MANIFEST).exists() or is_named_so:
        return CheckpointEntry(store_at(path.parent, key), path.name, str(directory)).looked_at()
    return None


def found_in(store: CheckpointStore, prefix: str) -> list[CheckpointEntry]:
    """Return the checkpoints of one run, the oldest first; last those of which nobody knows the age."""
    names = sorted([*store.names(), *store.others()])
    found = [CheckpointEntry(store, name, f"{prefix}{name}").looked_at() for name in names]
    return sorted((one for one in found if not one.is_gone), key=sort_key)


def sort_key(found: CheckpointEntry) -> tuple[float, int]:
    """Return what the checkpoints of one run are sorted by."""
    return (math.inf, 0) if found.manifest is None else (found.manifest.sequence, found.manifest.step)

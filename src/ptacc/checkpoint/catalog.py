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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ptacc.checkpoint.retention import rank_best
from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.files.paths import resolve_links, split_path
from ptacc.files.remote_filesystem import select_filesystem
from ptacc.storage.manifest import Manifest
from ptacc.storage.remote_store import open_store
from ptacc.storage.store import MANIFEST, PREFIX, CheckpointStore
from ptacc.types.monitor import Monitor


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


# ---- choosing one


def choose(
    directory: str,
    entries: Sequence[CheckpointEntry],
    which: str | Monitor | None,
    report: Callable[[CheckpointEntry], object],
) -> CheckpointEntry:
    """Return the best intact checkpoint by a value, the newest one with a label, or for None the newest of all.

    `report` is called with each damaged checkpoint that is skipped. One without a valid manifest may be the best.

    Raises:
        CheckpointError: No intact checkpoint has the value or the label.
    """
    unknown = [entry for entry in entries if entry.manifest is None]
    for entry in reversed(entries) if which is None else (*unknown, *rank(entries, which)):
        checked = entry.check(files=True)
        if not checked.problem:
            return checked
        if not checked.is_gone:
            report(checked)
    raise CheckpointError(f"{directory} contains no intact checkpoint{describe_choice(entries, which)}.")


def find_best(directory: str, entries: Sequence[CheckpointEntry], monitor: Monitor) -> CheckpointEntry:
    """Return the best checkpoint by a value, without reading its files, or raise as `choose` does."""
    intact = [entry for entry in entries if not entry.problem]
    if ranked := rank(intact, monitor):
        return ranked[0]
    raise CheckpointError(f"{directory} contains no intact checkpoint{describe_choice(intact, monitor)}.")


def rank(entries: Sequence[CheckpointEntry], which: str | Monitor) -> list[CheckpointEntry]:
    """Return the checkpoints with a value, best first, or those with a label, newest first."""
    known = {id(entry.manifest): entry for entry in entries}
    manifests = [entry.manifest for entry in entries if entry.manifest is not None]
    if isinstance(which, Monitor):
        ranked = rank_best(manifests, which)
    else:
        ranked = [manifest for manifest in reversed(manifests) if manifest.label == which]
    return [known[id(manifest)] for manifest in ranked]


def describe_choice(entries: Sequence[CheckpointEntry], which: str | Monitor | None) -> str:
    """Return what was looked for, and what the checkpoints have instead."""
    if which is None:
        return ""
    manifests = [entry.manifest for entry in entries if entry.manifest is not None]
    if isinstance(which, Monitor):
        names, what = {name for manifest in manifests for name in manifest.metrics}, f"with a value {which.name!r}"
    else:
        names, what = {manifest.label for manifest in manifests} - {""}, f"with the label {which!r}"
    return f" {what}. There are: {', '.join(sorted(names)) or 'none'}"

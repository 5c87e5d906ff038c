"""Resuming: which checkpoint a run goes on from, and what of it each process takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptacc.checkpoint.parts import SHARDS, SHARED, Snapshot, merge_shards, rank_files, read_parts
from ptacc.checkpoint.storage.filesystem import as_checkpoint_error
from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.storage.paths import make_absolute, parse_path, split_path
from ptacc.checkpoint.storage.remote_store import open_sibling
from ptacc.checkpoint.storage.store import MANIFEST, CheckpointStore
from ptacc.checkpoint.trainer_state import RUN
from ptacc.engines.base import Engine
from ptacc.errors import CheckpointError
from ptacc.run.state import ResumeState


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint to go on from.

    Args:
        directory: Where it is, and others of its run.
        name: Its name there.
    """

    directory: str
    name: str


def find(store: CheckpointStore, resume: bool | str | Path) -> CheckpointRef | None:
    """Find the checkpoint that a run goes on from, None where it starts afresh.

    Args:
        store: The run's own.
        resume: True for the newest that is whole, False for none, or the path of one, or of a directory of them.

    Raises:
        CheckpointError: There is none at the path; or a fresh run would share a directory with another.
        DamagedCheckpointError: The one at the path is damaged.

    Warns:
        UserWarning: A damaged checkpoint was passed over.
    """
    if not isinstance(resume, bool):
        return find_at(make_absolute(parse_path(resume)), store)
    if resume:
        return find_newest(store)
    if there := store.names():
        raise CheckpointError(
            f"{store.directory} has checkpoints of another run, the last of them {there[-1]}. Give resume=True to go "
            "on with that run, or a directory of its own to a new one."
        )
    return None


def find_at(path: str, like: CheckpointStore) -> CheckpointRef:
    """Find the checkpoint at a path, or the newest in the directory that is there."""
    with as_checkpoint_error(path):
        if like.filesystem.exists(f"{path}/{MANIFEST}"):
            directory, name = split_path(path)
            return CheckpointRef(directory, open_sibling(like, directory).verify(name).name)
    found = find_newest(open_sibling(like, path))
    if found is None:
        raise CheckpointError(f"resume={path!r}: there is no checkpoint that is whole.")
    return found


def find_newest(store: CheckpointStore) -> CheckpointRef | None:
    """Find the newest checkpoint that is whole."""
    with as_checkpoint_error(store.directory):  # what cannot be reached is not passed over
        manifest, passed_over = store.newest()
    for name, error in passed_over.items():
        warnings.warn(f"{store.locate(name)} is passed over: {error}", stacklevel=2)
    if manifest is None and passed_over:
        name, error = next(iter(passed_over.items()))
        raise CheckpointError(
            f"{store.directory} has {len(passed_over)} checkpoints, and none of them is whole; of {name}: {error} Move "
            "them away to start afresh."
        )
    return None if manifest is None else CheckpointRef(store.directory, manifest.name)


@dataclass(frozen=True)
class Resumption:
    """A checkpoint as one process goes on from it.

    Args:
        path: Where it is.
        manifest: What it is.
        shared: The parts that all processes have in common.
        own: This process's own parts; where their number has changed, what can be made of all of theirs.
    """

    path: str
    manifest: Manifest
    shared: Snapshot
    own: Snapshot

    @classmethod
    def read(cls, store: CheckpointStore, name: str, rank: int, world_size: int) -> Resumption:
        """Read a checkpoint, each file checked before it is parsed."""
        with as_checkpoint_error(store.locate(name)):
            manifest = store.manifest(name)
            shared = read_parts(store, manifest, SHARED)
            if manifest.world_size == world_size:
                mine = read_parts(store, manifest, rank_files(rank))
                shards = mine.states.get(SHARDS, {})
            else:
                theirs = [read_parts(store, manifest, rank_files(other)) for other in range(manifest.world_size)]
                mine = Snapshot({RUN: merge_runs([one.take(RUN) for one in theirs])})
                shards = merge_shards(theirs)
        return cls(store.locate(name), manifest, shared.joined(shards), mine)

    def revived(self, engine: Engine) -> Resumption:
        """Return it with the tensors that were saved in shards as an engine holds them."""
        return replace(self, shared=self.shared.mapped(engine.localize))

    def saved_run(self, *, with_file: bool) -> ResumeState:
        """Return the run, for the core to go on with.

        Args:
            with_file: Whether the history goes on in the file that it was written to.
        """
        run = self.shared.take(RUN)
        history = run["history"] if with_file else {**run["history"], "file": None}
        return ResumeState({**run, "history": history}, self.own.take(RUN))


def merge_runs(runs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Make of what each of several processes had of the run what each of another number of them goes on with."""
    wishes = [run["wish"] for run in runs if run["wish"] is not None]
    return {
        # Each process's sum is of losses that are averaged over the processes.
        "losses": sum(run["losses"] for run in runs) / len(runs),
        "wish": wishes[0] if wishes else None,
        "data": {name: value for name, value in runs[0]["data"].items() if name != "last"},
    }

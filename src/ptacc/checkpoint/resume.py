"""Resuming: which checkpoint a run resumes from, and what each rank reads of it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

from ptacc.checkpoint.parts import (
    OPTIONS,
    RUN,
    SHARDS,
    SHARED,
    Snapshot,
    merge_shards,
    rank_files,
    read_all_ranks,
    read_parts,
)
from ptacc.core.module_options import merge_options
from ptacc.distributed.process_group import Distributed
from ptacc.errors import CheckpointError
from ptacc.files.filesystem import as_checkpoint_error
from ptacc.files.paths import parse_path, resolve_links, split_path
from ptacc.run.state import ResumeState
from ptacc.storage.manifest import Manifest
from ptacc.storage.remote_store import open_sibling, open_store
from ptacc.storage.store import MANIFEST, CheckpointStore
from ptacc.types.protocols import StateDict


def choose_checkpoint(store: CheckpointStore, resume: bool | str | PathLike[str]) -> str | None:
    """Return the path of the checkpoint that a run resumes from; None if the run starts from the beginning.

    Args:
        store: The store of the run.
        resume: True for the newest intact checkpoint, False for none, or the path of a checkpoint or of a directory of
            them.

    Raises:
        CheckpointError: The path has no checkpoint, or `resume` is False and another run uses the directory.
        DamagedCheckpointError: The checkpoint at the path is damaged.

    Warns:
        UserWarning: A damaged checkpoint is skipped.
    """
    if not isinstance(resume, bool):
        return find_at(parse_path(resume), store)
    if resume:
        return find_newest(store)
    if names := store.names():
        raise CheckpointError(
            f"{store.directory} has checkpoints of another run, the last of them {names[-1]}. Set resume=True to "
            "resume that run, or give the new run a directory of its own."
        )
    return None


def find_at(path: str, like: CheckpointStore) -> str:
    """Return the path of a checkpoint, verified, or that of the newest one in a directory. Either may be a link."""
    path = resolve_links(path)
    with as_checkpoint_error(path):
        if like.filesystem.exists(f"{path}/{MANIFEST}"):
            directory, name = split_path(path)
            store = open_sibling(like, directory)
            return store.locate(store.verify(name).name)
    found = find_newest(open_sibling(like, path))
    if found is None:
        raise CheckpointError(f"resume={path!r}: no intact checkpoint was found.")
    return found


def find_newest(store: CheckpointStore) -> str | None:
    """Return the path of the newest intact checkpoint; None if a store is empty. Raise if all are damaged."""
    with as_checkpoint_error(store.directory):  # an unreachable checkpoint is an error, not a damaged one
        manifest, damaged = store.newest()
    for name, error in damaged.items():
        warnings.warn(f"{store.locate(name)} is skipped: {error}", stacklevel=2)
    if manifest is None and damaged:
        name, error = next(iter(damaged.items()))
        raise CheckpointError(
            f"{store.directory} has {len(damaged)} checkpoints, and none of them is intact. The newest, {name}: "
            f"{error} Move them away to start from the beginning."
        )
    return None if manifest is None else store.locate(manifest.name)


@dataclass(frozen=True)
class Resumption:
    """A checkpoint as one rank resumes from it.

    If the number of ranks has changed, the rank's own parts are the state of the run, merged from all ranks, and rank
    0's buffers of modules among the options.
    """

    path: str
    manifest: Manifest
    shared: Snapshot
    own: Snapshot

    @classmethod
    def read(cls, path: str, key: bytes | None, distributed: Distributed) -> Resumption:
        """Read a checkpoint. Each file is verified before it is parsed."""
        directory, name = split_path(path)
        store = open_store(directory, key)
        with as_checkpoint_error(path):
            manifest = store.manifest(name)
            shared = read_parts(store, manifest, SHARED)
            if manifest.world_size == distributed.world_size:
                own = read_parts(store, manifest, rank_files(distributed.rank))
                shards = own.get(SHARDS, {})
            else:
                all_ranks = read_all_ranks(store, manifest)
                merged = merge_run_states([parts[RUN] for parts in all_ranks])
                own = Snapshot({RUN: merged, OPTIONS: all_ranks[0][OPTIONS]})
                shards = merge_shards(all_ranks)
        return cls(path, manifest, Snapshot({**shared, **shards}), own)

    @property
    def invariants(self) -> Mapping[str, str]:
        """What must be the same when the run is resumed, by name."""
        return cast(Mapping[str, str], self.shared[RUN]["conditions"])

    @property
    def options(self) -> dict[str, StateDict]:
        """The tensors of each module among the options."""
        return merge_options(self.shared[OPTIONS], self.own[OPTIONS])

    def resume_state(self, ignored: Collection[str]) -> ResumeState:
        """Return the state of the run.

        With `"history"` in `ignored`, the history continues in another file than that of the saved run; with `"stop"`,
        a run that `trainer.stop()` has stopped continues.
        """
        run: StateDict = {**self.shared[RUN]}
        if "history" in ignored:
            run["history"] = {**run["history"], "file": None}
        if "stop" in ignored:
            run["stopped"] = None
        return ResumeState(run, self.own[RUN])


def merge_run_states(runs: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the run states of all ranks into one that each rank of another number of ranks resumes from."""
    requests = [run["stop_request"] for run in runs if run["stop_request"] is not None]
    return {
        "stop_request": requests[0] if requests else None,
        "data": {name: value for name, value in runs[0]["data"].items() if name != "last"},
    }

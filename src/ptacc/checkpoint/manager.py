"""The checkpoints of one run, which all its processes save together."""

from __future__ import annotations

import secrets
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from ptacc.checkpoint.parts import SHARED, encode_parts, rank_files
from ptacc.checkpoint.resume import Resumption
from ptacc.checkpoint.retention import Retention
from ptacc.checkpoint.writer import Save, copy_to_host
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import CheckpointError
from ptacc.files.filesystem import as_checkpoint_error
from ptacc.files.paths import resolve_links, split_path
from ptacc.storage.lock import LOCK, DirectoryLock
from ptacc.storage.manifest import Manifest
from ptacc.storage.remote_store import open_sibling
from ptacc.storage.store import CheckpointStore
from ptacc.types.aliases import T

OnError: TypeAlias = Literal["raise", "warn"]

SEEN_WITHIN_SECONDS = 10.0
"""How long it may take until a file in a shared directory is visible on another host."""
ABANDON_SECONDS = 10.0
"""How long to wait for the files of other ranks when an error ends the run."""


@dataclass
class CheckpointManager:
    """Saves the checkpoints of one run, and removes old ones.

    Args:
        lock: The lock of the directory, which rank 0 holds.
        in_background: Whether to write checkpoints while training continues.
        identity: Of the run: the same on all ranks, and in the runs that resume it.
        resumed_from: The name of the checkpoint that the run was resumed from, which is never removed.
    """

    store: CheckpointStore
    distributed: DistributedRuntime
    retention: Retention
    lock: DirectoryLock
    on_error: OnError = "raise"
    in_background: bool = False
    identity: str = field(default_factory=lambda: secrets.token_hex(8))
    resumed_from: str | None = None
    _save: Save | None = None
    _buffers: defaultdict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    # ---- opening

    def open(self, resumption: Resumption | None = None) -> None:
        """Remove what is left of interrupted saves, and check that all ranks see the same directory. A collective.

        Raises:
            CheckpointError: The directory cannot be written to, is another run's, or is not the same on all hosts.
        """
        self.identity = self.distributed.broadcast(self.identity) if resumption is None else resumption.manifest.run
        directory = resolve_links(self.store.directory)
        if resumption is not None and split_path(resolve_links(resumption.path))[0] == directory:
            self.resumed_from = resumption.manifest.name
        self.call_on_rank_0(self._clean_up)
        owner, deadline = self.distributed.broadcast(self.lock.owner), time.monotonic() + SEEN_WITHIN_SECONDS
        with as_checkpoint_error(self.store.directory):
            while not (sees_lock := self.lock.read() == owner) and time.monotonic() < deadline:
                time.sleep(0.05)
        blind = [rank for rank, sees in enumerate(self.distributed.gather(sees_lock)) if not sees]
        if blind:
            raise CheckpointError(
                f"{self.store.directory} is not one directory for all processes: rank {blind[0]} does not see the "
                f"file {LOCK} that rank 0 created there. Give a directory that all hosts share."
            )

    def _clean_up(self) -> None:
        if others := [manifest.name for manifest in self.store.manifests() if manifest.run != self.identity]:
            raise CheckpointError(f"{others[-1]} belongs to another run. Give this run its own directory.")
        self.store.clean_up()

    def call_on_rank_0(self, call: Callable[[], T]) -> T:
        """Call a function on rank 0, and return its result on all ranks, or raise its error."""
        value, error = None, None
        if self.distributed.rank == 0:
            try:
                value = call()
            except (OSError, CheckpointError) as caught:
                error = f"{self.store.directory}: {caught}"
        value, error = self.distributed.broadcast((value, error))
        if error is not None:
            raise CheckpointError(error)
        return value  # type: ignore[return-value]  # `call` was called on rank 0

    # ---- saving

    def begin(
        self, manifest: Manifest, shared: Mapping[str, object], own: Mapping[str, object], path: str | None
    ) -> str | None:
        """Save a checkpoint, or begin to save one in the background, after `finish()`. A collective.

        The manifest has no name and no files yet. The default path is in the run's directory, named by its step.

        Returns:
            The path of the checkpoint, None if it is not complete yet or could not be saved.

        Raises:
            CheckpointError: It could not be saved, and `on_error` is `"raise"`.
        """
        store, name = self.store, ""
        if path is not None:
            directory, name = split_path(path)
            store = open_sibling(self.store, directory)
        try:
            pending = self.call_on_rank_0(lambda: store.begin(name or store.free_name(manifest.step)))
        except CheckpointError as error:
            self._report(error)
            return None
        files = {rank_files(self.distributed.rank): encode_parts(own)}
        if self.distributed.rank == 0:
            files[SHARED] = encode_parts(shared)
        if self.in_background:
            files = {name: copy_to_host(parts, self._buffers[name]) for name, parts in files.items()}
        on_commit = self._remove_old if store is self.store else None
        self._save = Save(store, pending, manifest, files, self.distributed, self.lock, on_commit)
        self._save.start()
        return None if self.in_background else self.finish()

    def check(self) -> None:
        """Raise the error of a checkpoint in the background as soon as rank 0 has it."""
        error = None if self._save is None else self._save.error
        # On another rank, the error may be a consequence of one on rank 0, which removes the files of all ranks.
        if error is not None and self.on_error == "raise" and self.distributed.rank == 0:
            self._save = None
            raise error

    def finish(self) -> str | None:
        """Wait for a checkpoint in the background, and return its path or raise its error. A collective."""
        save, self._save = self._save, None
        if save is None:
            return None
        is_main = self.distributed.rank == 0
        if not is_main:
            save.join()
        # Rank 0 may be waiting for a rank whose disk is too full even for the note that it has failed.
        errors = self.distributed.gather(None if is_main or save.error is None else str(save.error))
        if is_main:
            save.cancelled = next(filter(None, errors), "")
            save.join()
        if message := self.distributed.broadcast(str(save.error or "")):
            error = CheckpointError(message)
            error.__cause__ = save.error
            self._report(error)
            return None
        return save.store.locate(save.pending.name)

    def abandon(self) -> None:
        """Wait for a checkpoint in the background after an error, when other ranks may have ended. Not a collective."""
        save, self._save = self._save, None
        if save is None:
            return
        if not save.join(ABANDON_SECONDS):
            save.cancelled = f"{save.pending.name} was not saved: the run ended before another rank wrote its files."
            save.join()
        if save.error is not None:
            self.warn(str(save.error))

    def _remove_old(self, newest: str) -> None:
        """Remove the checkpoints that no rule keeps, if the files of the newest are there and have their sizes.

        Their content was hashed when it was written. To read it again would cost as much as writing it, and would read
        what the system still has in memory, not the disk.
        """
        protected = {newest, *filter(None, [self.resumed_from])}
        try:
            if removable := self.retention.removable(self.store.manifests(), protected):
                self.store.verify(newest, hashes=False)
            for name in removable:
                self.store.remove(name)
        except (OSError, CheckpointError) as error:
            warnings.warn(f"{self.store.directory}: old checkpoints were not removed: {error}", stacklevel=2)

    def _report(self, error: CheckpointError) -> None:
        if self.on_error == "raise":
            raise error
        self.warn(f"{error} The run continues without this checkpoint.")

    def warn(self, message: str) -> None:
        """Warn once for all ranks."""
        if self.distributed.rank == 0:
            warnings.warn(message, stacklevel=2)

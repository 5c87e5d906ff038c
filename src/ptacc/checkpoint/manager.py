"""A line of checkpoints: those of one run, saved and kept by all its processes together."""

from __future__ import annotations

import functools
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ptacc.checkpoint.parts import SHARED, Part, encode_parts, own
from ptacc.checkpoint.resume import Resumption
from ptacc.checkpoint.retention import Retention
from ptacc.checkpoint.storage.filesystem import as_checkpoint_error
from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.storage.remote_store import store_beside
from ptacc.checkpoint.storage.store import CheckpointStore, PendingCheckpoint
from ptacc.checkpoint.writer import HostCopies, NonFiniteWeightsError, Save, Writer
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import CheckpointError
from ptacc.types.aliases import T
from ptacc.types.progress import Progress
from ptacc.types.protocols import StateDict

OnError: TypeAlias = Literal["raise", "warn"]

TOKEN = ".token-"
SEEN_WITHIN_SECONDS = 10.0
"""How long another host may take to see a file of a directory that they share."""
UNWATCHED_SECONDS = 10.0
"""How long other processes may take to write their files when a run ends by an error."""


@dataclass
class CheckpointManager:
    """The checkpoints of one run.

    Args:
        store: Where they are.
        distributed: The processes.
        retention: Which are kept.
        on_error: What to do when one cannot be saved.
        in_background: Whether they are written beside the steps.
        identity: Of the run, the same on all processes and after each going on.
        resumed_from: The name of the checkpoint that the run went on from, which is never removed.
        saved_at: How far the run was when it was saved last.
    """

    store: CheckpointStore
    distributed: DistributedRuntime
    retention: Retention
    on_error: OnError = "raise"
    in_background: bool = False
    identity: str = field(default_factory=lambda: secrets.token_hex(8))
    resumed_from: str | None = None
    saved_at: Progress = field(default_factory=Progress)
    _save: Save | None = None
    _copies: HostCopies = field(default_factory=HostCopies)

    # ---- what a checkpoint holds of it

    def state_dict(self) -> StateDict:
        """Return whose line it is, when the run was saved last, and with which versions."""
        at = self.saved_at
        return {
            "identity": self.identity,
            "saved_at": {"steps": at.steps, "epochs": at.epochs, "batches": at.batches, "seconds": at.seconds},
            "versions": dict(versions()),
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Be the line of the run that goes on."""
        self.identity = state_dict["identity"]
        self.saved_at = Progress(**state_dict["saved_at"])
        before, now = state_dict["versions"], versions()
        if changed := [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name) != now[name]]:
            warnings.warn(
                f"The run goes on with other versions ({', '.join(changed)}): what comes may differ in the last bits "
                "from what would have come.",
                stacklevel=2,
            )

    # ---- opening

    def open(self, origin: Resumption | None = None) -> None:
        """Make the directory, sweep it, and see that all processes share it. A collective.

        Args:
            origin: The checkpoint that the run goes on from.

        Raises:
            CheckpointError: It cannot be written, is another run's, or another host has another of this name.
        """
        self.identity = self.distributed.broadcast(self.identity) if origin is None else origin.manifest.run
        if origin is not None and origin.path.parent == self.store.directory:
            self.resumed_from = origin.manifest.name
        path = self.store.directory / self._on_rank_0(self._leave_token)
        deadline = time.monotonic() + SEEN_WITHIN_SECONDS
        with as_checkpoint_error(self.store.directory):
            while not (sees := path.exists()) and time.monotonic() < deadline:
                time.sleep(0.05)
        blind = [rank for rank, sees in enumerate(self.distributed.gather(sees)) if not sees]
        self._on_rank_0(path.unlink)
        if blind:
            raise CheckpointError(
                f"{self.store.directory} is not one directory for all processes: what rank 0 wrote there, rank "
                f"{blind[0]} does not see. Give a directory that all hosts share."
            )

    def _leave_token(self) -> str:
        if others := [there.name for there in self.store.manifests() if there.run != self.identity]:
            raise CheckpointError(f"{others[-1]} is of another run. Give this one a directory of its own.")
        self.store.prepare()
        self.store.clean_up()
        for left in self.store.directory.iterdir() if self.store.directory.is_dir() else ():
            if left.name.startswith(TOKEN):  # by a process that ended right after this place
                left.unlink()
        token = f"{TOKEN}{secrets.token_hex(4)}"
        (self.store.directory / token).touch(exist_ok=False)
        return token

    def _on_rank_0(self, act: Callable[[], T]) -> T:
        """Let rank 0 act, and return on all processes what it returns, or raise what it raises."""
        value, error = None, None
        if self.distributed.rank == 0:
            try:
                value = act()
            except (OSError, CheckpointError) as caught:
                error = f"{self.store.directory}: {caught}"
        value, error = self.distributed.broadcast((value, error))
        if error is not None:
            raise CheckpointError(error)
        return value  # type: ignore[return-value]  # rank 0 acted

    # ---- saving

    def begin(
        self,
        at: Progress,
        manifest: Manifest,
        shared: Sequence[Part],
        mine: Sequence[Part],
        path: Path | None = None,
        weights: Sequence[tuple[str, Tensor]] = (),
    ) -> Path | None:
        """Begin a checkpoint, and make it, unless that is left to the background. A collective.

        Args:
            at: How far the run is.
            manifest: What it is, but for its name and its files.
            shared: The parts that all processes have in common; rank 0 writes its own.
            mine: The parts that are this process's own.
            path: Where to save it; in the line's own directory, named by its step, if not given.
            weights: What this process holds of the weights, by name, where only numbers are to be saved.

        Returns:
            Where it is, None where it is not there yet, or could not be saved.

        Raises:
            CheckpointError: It could not be saved, and errors are to be raised.
        """
        self.finish()
        store = self.store if path is None else store_beside(self.store, path.parent)
        try:
            draft = self._on_rank_0(lambda: self._begin(at, store, path))
        except CheckpointError as error:
            self._report(error)
            return None
        encoded = {own(self.distributed.rank): encode_parts(mine)}
        if self.distributed.rank == 0:
            encoded[SHARED] = encode_parts(shared)
        if self.in_background:
            encoded = self._copies.of(encoded)
            weights = [(name, self._copies.copy_of(tensor)) for name, tensor in weights]
        writer = Writer(store, draft, manifest, encoded, self.distributed, weights)
        after = self._rotate if store is self.store else _nothing
        self._save = Save(writer, after, in_background=self.in_background)
        return None if self.in_background else self.finish()

    def _begin(self, at: Progress, store: CheckpointStore, path: Path | None) -> PendingCheckpoint:
        if path is None:
            return store.begin(store.free_name(at.steps))
        store.prepare()
        return store.begin(path.name)

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._save is not None

    def check(self) -> None:
        """Raise the error of a checkpoint in the background, as soon as rank 0 knows it.

        What other processes know may be what came of rank 0's own error: it removes the files that they write.
        """
        error = None if self._save is None else self._save.error
        if error is None or isinstance(error, NonFiniteWeightsError):
            return
        if self.on_error == "raise" and self.distributed.rank == 0:
            self._save = None
            raise error

    def finish(self) -> Path | None:
        """Wait for a checkpoint that is under way, and return where it is. A collective.

        Raises:
            CheckpointError: It could not be saved, and errors are to be raised.
        """
        if self._save is None:
            return None
        save, self._save = self._save, None
        error = self._outcome(save)
        if error is not None:
            error.__cause__ = save.error
            self._report(error)
            return None
        return save.writer.store.directory / save.writer.draft.name

    def _outcome(self, save: Save) -> CheckpointError | None:
        """Wait for all processes, and return on all of them what rank 0 says: the error, or None. A collective."""
        is_first = self.distributed.rank == 0
        if not is_first:
            save.join()
        # Rank 0 may be waiting for files that will not come, of a process whose disk was too full to leave word.
        errors = self.distributed.gather(None if is_first or save.error is None else str(save.error))
        if is_first:
            if lost := next(filter(None, errors), None):
                save.give_up(lost)
            save.join()
        message, is_unfit = self.distributed.broadcast(
            (str(save.error or ""), isinstance(save.error, NonFiniteWeightsError))
        )
        return (NonFiniteWeightsError if is_unfit else CheckpointError)(message) if message else None

    def abandon(self) -> None:
        """Let a checkpoint that is under way end, where the other processes may be gone. No collective."""
        save, self._save = self._save, None
        if save is None:
            return
        if not save.join(UNWATCHED_SECONDS):
            name = save.writer.draft.name
            save.give_up(f"{name} was not saved: the run had ended, and a process had not written its files.")
            save.join()
        if save.error is not None and self.distributed.rank == 0:
            warnings.warn(str(save.error), stacklevel=2)

    def _rotate(self, newest: str) -> None:
        """Remove what no rule keeps, once the newest is verified."""
        protected = {newest, *filter(None, [self.resumed_from])}
        try:
            removable = self.retention.removable(self.store.manifests(), protected)
            if removable:
                self.store.verify(newest)
            for name in removable:
                self.store.remove(name)
        except (OSError, CheckpointError) as error:
            warnings.warn(f"{self.store.directory}: old checkpoints were not removed: {error}", stacklevel=2)

    def _report(self, error: CheckpointError) -> None:
        is_unfit = isinstance(error, NonFiniteWeightsError)
        if self.on_error == "raise" and not is_unfit:
            raise error
        if self.distributed.rank == 0:
            warnings.warn(str(error) if is_unfit else f"{error} The run goes on without.", stacklevel=2)


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions on which it depends what numbers come out to the last bit."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "accelerate": version("accelerate"),
    }


def _nothing(name: str) -> None:
    """Leave other checkpoints alone."""

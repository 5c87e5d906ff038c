"""Loading and exporting outside of a run: weights, and an optimizer's state, by themselves."""

from __future__ import annotations

from pathlib import Path

from ptacc.checkpoint.contents import MODEL, load_optimizer, load_weights, weights_of
from ptacc.checkpoint.disk import Disk
from ptacc.checkpoint.export import check_target, exported_weights, write_weights
from ptacc.checkpoint.resuming import find_at
from ptacc.checkpoint.snapshot import SHARED, Snapshot, read_parts
from ptacc.checkpoint.store import CheckpointStore
from ptacc.core.hooks import TrainerCore
from ptacc.errors import CheckpointError
from ptacc.protocols import Stateful


def load_into(trainer: TrainerCore, path: Path, key: bytes | None, *, weights_only: bool) -> Path:
    """Load a checkpoint's weights, and the optimizer's state, into a trainer; return where it is.

    Raises:
        CheckpointError: There is none at the path, or it is of another model.
    """
    found = find_at(path, CheckpointStore(path, key))
    store = CheckpointStore(found.directory, key)
    shared = read_parts(store, store.manifest(found.name), SHARED)
    load_weights(trainer.unwrapped_model, shared.take(MODEL))
    if not weights_only:
        for slot in trainer.slots():
            load_optimizer(slot.optimizer, shared.take(slot.name))
    return found.directory / found.name


def export_from(trainer: TrainerCore, path: Path, averages: str | None, *, overwrite: bool) -> None:
    """Write a trainer's weights, or the averages of its last run, to a safetensors file.

    Raises:
        CheckpointError: There is a file already, or no such averages; or it cannot be written.
    """
    states = {MODEL: weights_of(trainer.unwrapped_model)}
    if averages is not None and trainer.has_run:
        kept = {key.name: state for key, state in trainer.run.states() if isinstance(state, Stateful)}
        states |= {averages: kept[averages].state_dict()} if averages in kept else {}
    check_target(path, overwrite=overwrite)
    try:
        write_weights(Disk(), path, exported_weights(Snapshot(states), averages), overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"{path} was not written: {error}.") from error

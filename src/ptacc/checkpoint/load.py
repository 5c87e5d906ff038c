"""Loading and exporting outside of a run: weights, and an optimizer's state, by themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptacc.checkpoint.export import check_target, exported_weights, write_weights
from ptacc.checkpoint.parts import Snapshot, read_full_parts
from ptacc.checkpoint.resume import find_at
from ptacc.checkpoint.storage.filesystem import as_checkpoint_error
from ptacc.checkpoint.storage.remote_filesystem import select_filesystem
from ptacc.checkpoint.storage.remote_store import open_store
from ptacc.checkpoint.trainer_state import MODEL
from ptacc.core.hooks import TrainerCore
from ptacc.errors import CheckpointError
from ptacc.model.state_dict import get_weights, load_optimizer, load_weights
from ptacc.tensors.dtensor import is_dtensor, map_state, whole_tensor
from ptacc.types.protocols import Stateful


def load_into(trainer: TrainerCore, path: str, key: bytes | None, *, weights_only: bool) -> str:
    """Load a checkpoint's weights, and the optimizer's state, into a trainer; return where it is.

    Raises:
        CheckpointError: There is none at the path, or it is of another model.
    """
    found = find_at(path, open_store(path, key))
    store = open_store(found.directory, key)
    with as_checkpoint_error(path):
        shared = read_full_parts(store, store.manifest(found.name))
    load_weights(trainer.unwrapped_model, shared.take(MODEL))
    if not weights_only:
        for slot in trainer.optimizer_slots():
            load_optimizer(slot.optimizer, shared.take(slot.name))
    return store.locate(found.name)


def check_export(path: str, *, overwrite: bool) -> None:
    """Raise `CheckpointError` for a path that no weights are written to."""
    with as_checkpoint_error(path):
        check_target(select_filesystem(path), path, overwrite=overwrite)


def states_to_export(trainer: TrainerCore, averages: str | None) -> dict[str, Any]:
    """Return a trainer's weights, and the averages of its last run, whole. All processes call it; rank 0 has them.

    Args:
        trainer: Within a run, or outside of one.
        averages: The part whose averages are wanted, too.
    """
    weights = trainer.run.engine.weights() if trainer.is_running else get_weights(trainer.unwrapped_model)
    states: dict[str, Any] = {MODEL: weights}
    if averages is not None and trainer.has_run:
        kept = {key.name: state for key, state in trainer.run.states() if isinstance(state, Stateful)}
        states |= {averages: kept[averages].state_dict()} if averages in kept else {}
    is_first = trainer.distributed.rank == 0

    def for_first(value: Any) -> Any:
        if not is_dtensor(value):
            return value
        whole = whole_tensor(value)
        return whole.cpu() if is_first else None

    whole_states: dict[str, Any] = map_state(states, for_first)
    return whole_states


def export_to(path: str, states: Mapping[str, Any], averages: str | None, *, overwrite: bool) -> None:
    """Write weights, or averages in their place, to a safetensors file.

    Raises:
        CheckpointError: There is a file already, or no such averages; or it cannot be written.
    """
    try:
        write_weights(select_filesystem(path), path, exported_weights(Snapshot(states), averages), overwrite=overwrite)
    except OSError as error:
        raise CheckpointError(f"{path} was not written: {error}.") from error

"""Loading weights and the optimizer's state outside of a run, and exporting weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptacc.checkpoint.export import check_target, exported_weights, write_weights
from ptacc.checkpoint.parts import MODEL, Snapshot, read_full_parts
from ptacc.checkpoint.resume import find_at
from ptacc.checkpoint.storage.filesystem import as_checkpoint_error
from ptacc.checkpoint.storage.paths import split_path
from ptacc.checkpoint.storage.remote_filesystem import select_filesystem
from ptacc.checkpoint.storage.remote_store import open_store
from ptacc.core.hooks import TrainerCore
from ptacc.model.state_dict import get_weights, load_optimizer_state, load_weights
from ptacc.tensors.dtensor import full_tensor, is_dtensor, map_state
from ptacc.types.protocols import Stateful


def load_into(trainer: TrainerCore, path: str, key: bytes | None, *, weights_only: bool) -> str:
    """Load the weights of a checkpoint, and the optimizer's state, into a trainer; return the checkpoint's path.

    Raises:
        CheckpointError: The path has no checkpoint, or one of another model.
    """
    found = find_at(path, open_store(path, key))
    directory, name = split_path(found)
    store = open_store(directory, key)
    with as_checkpoint_error(path):
        shared = read_full_parts(store, store.manifest(name))
    load_weights(trainer.unwrapped_model, shared[MODEL])
    if not weights_only:
        for slot in trainer.optimizer_slots():
            load_optimizer_state(slot.optimizer, shared[slot.name])
    return found


def check_export(path: str, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if weights cannot be exported to a path."""
    with as_checkpoint_error(path):
        check_target(select_filesystem(path), path, overwrite=overwrite)


def states_to_export(trainer: TrainerCore, averages: str | None) -> dict[str, Any]:
    """Return a trainer's weights, and averages of its last run. A collective; rank 0 gets full tensors.

    Args:
        trainer: The trainer, within a run or not.
        averages: The name of the averages' part, such as `"ema"`; None for the weights alone.
    """
    is_running = trainer.is_running
    weights = trainer.run.engine.get_state().weights if is_running else get_weights(trainer.unwrapped_model)
    states: dict[str, Any] = {MODEL: weights}
    for key, state in trainer.run.states() if trainer.has_run else ():
        if key.name == averages and isinstance(state, Stateful):
            states[averages] = state.state_dict()

    def gather(value: Any) -> Any:
        if not is_dtensor(value):
            return value
        full = full_tensor(value)
        return full.cpu() if trainer.distributed.rank == 0 else None

    full_states: dict[str, Any] = map_state(states, gather)
    return full_states


def export_to(path: str, states: Mapping[str, Any], averages: str | None, *, overwrite: bool) -> None:
    """Write weights, or averages in their place, to a safetensors file.

    Raises:
        CheckpointError: The file exists, there are no such averages, or the file cannot be written.
    """
    weights = exported_weights(Snapshot(states), averages)
    with as_checkpoint_error(f"{path} was not written"):
        write_weights(select_filesystem(path), path, weights, overwrite=overwrite)

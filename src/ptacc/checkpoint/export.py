"""Exporting: a model's weights out of a snapshot, in one safetensors file that is read without ptacc.

```
Snapshot -> exported_weights() -> {name: tensor} -> write_weights() -> model.load_state_dict(load_file(path))
```
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from ptacc.checkpoint.parts import Snapshot
from ptacc.checkpoint.serialization.safetensors_file import safetensors_parts
from ptacc.checkpoint.storage.filesystem import FileSystem, Written, sync_directory, write_whole
from ptacc.checkpoint.storage.remote_filesystem import RemotePath
from ptacc.checkpoint.storage.store import MANIFEST
from ptacc.errors import CheckpointError, MissingPartError

MODEL = "model"
"""The name of the part that holds the model's weights."""
AVERAGES = ("ema", "swa")
"""The names of the parts that hold averages of them."""
RESERVED = "__metadata__"
"""What the header of a safetensors file calls something that is no tensor."""


def exported_weights(snapshot: Snapshot, averages: str | None = None) -> dict[str, Tensor]:
    """Return what `model.load_state_dict()` takes: a tensor for each name that its `state_dict()` has.

    Args:
        snapshot: The shared parts of a checkpoint.
        averages: The part whose averages stand in for the weights, such as `"ema"`. A name that has none keeps the
            model's own tensor, unless it is tied to one that has: then both have the average.

    Raises:
        MissingPartError: The snapshot has no such part.
        CheckpointError: What the part holds is no weights, or averages of nothing yet.
    """
    weights = require_tensors(get_part(snapshot, MODEL), MODEL)
    if averages is None:
        return weights
    state = get_part(snapshot, averages)
    if not isinstance(state, Mapping) or not {"updates", "averages"} <= state.keys():
        raise CheckpointError(f"The part {averages!r} holds no averages of weights.")
    if not state["updates"]:
        raise CheckpointError(
            f"The part {averages!r} averages nothing yet: nothing was taken into it before the checkpoint was saved. "
            "Export the model's own weights, or a later checkpoint."
        )
    return averaged(weights, require_tensors(state["averages"], averages))


def averaged(weights: Mapping[str, Tensor], averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with averages for those that have one; of a tied weight, one name has it for all."""
    by_place = {storage_key(weights[name]): average for name, average in averages.items() if name in weights}
    # An average whose name is not among the weights is one of a buffer that is not persistent.
    return {name: averages.get(name, by_place.get(storage_key(weight), weight)) for name, weight in weights.items()}


def storage_key(tensor: Tensor) -> tuple[object, ...]:
    """Return what two names have in common whose tensor is one."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def get_part(snapshot: Snapshot, name: str) -> object:
    """Return the state of a part to export."""
    if name not in snapshot.states:
        there = ", ".join(sorted(snapshot.states)) or "no part at all"
        raise MissingPartError(f"The checkpoint has no part {name!r} to export. It has: {there}.")
    state: object = snapshot.states[name]
    return state


def require_tensors(state: object, part: str) -> dict[str, Tensor]:
    """Return a state that is tensors by name, and refuse any other."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"The part {part!r} is a {type(state).__name__}, not tensors by name: no weights.")
    for name, value in state.items():
        if not isinstance(value, Tensor) or name == RESERVED:
            raise CheckpointError(
                f"{part}[{name!r}] is a {type(value).__name__}, which a safetensors file has no place for under that "
                "name. Where it is a module's extra state, let its get_extra_state() return a tensor."
            )
    return dict(state)


def write_weights(disk: FileSystem, path: Path, tensors: Mapping[str, Tensor], *, overwrite: bool = False) -> Written:
    """Write tensors to a safetensors file: durably, and so that it is there whole or not at all.

    Args:
        disk: What writes.
        path: Where to.
        tensors: By their names; each name has its data, also where two are one tensor.
        overwrite: Whether a file that is there is replaced.

    Raises:
        CheckpointError: The path is taken or cannot be written to, or a tensor is of a dtype that the format lacks.
    """
    check = partial(check_target, path, overwrite=overwrite)
    check()
    written = write_whole(disk, path, safetensors_parts(tensors), check)  # writing takes long, and others write too
    sync_directory(disk, path.parent)
    return written


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` for a path that no weights are written to."""
    if not isinstance(path, RemotePath) and not path.parent.is_dir():
        raise CheckpointError(f"There is no directory {path.parent} to write {path.name} to: make it first.")
    if (path.parent / MANIFEST).exists():
        raise CheckpointError(f"{path} is in a checkpoint, which another file would damage: write to somewhere else.")
    if not path.is_symlink() and not path.exists():
        return
    if not path.is_file():
        raise CheckpointError(f"{path} is there already and is no file, so nothing is written over it.")
    if not overwrite:
        raise CheckpointError(
            f"{path} exists already: choose another name, or have it replaced with overwrite=True (--force)."
        )

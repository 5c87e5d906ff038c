"""Exporting the weights of a trainer or a checkpoint to one safetensors file, which is read without ptacc.

```
trainer -> states_to_export() -+
                               |-> exported_weights() -> {name: tensor} -> write_weights() -> a safetensors file
checkpoint -> Snapshot --------+
```
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor

from ptacc.checkpoint.parts import MODEL, Snapshot
from ptacc.core.frozen import find_trained
from ptacc.core.hooks import TrainerCore
from ptacc.distributed.process_group import DistributedRuntime
from ptacc.errors import CheckpointError
from ptacc.files.filesystem import FileDigest, FileSystem, as_checkpoint_error
from ptacc.files.paths import is_url, parse_path, resolve_links, split_path
from ptacc.files.remote_filesystem import select_filesystem
from ptacc.model.averaging import AveragedWeights, holds_averages
from ptacc.model.state_dict import get_weights
from ptacc.serialization.json_codec import get_memory_key
from ptacc.serialization.safetensors_file import safetensors_parts
from ptacc.storage.store import MANIFEST
from ptacc.tensors.dtensor import full_tensor, is_dtensor, map_state

AVERAGES = ("ema", "swa")
"""The names of the parts with averaged weights."""


def export_weights(
    trainer: TrainerCore,
    distributed: DistributedRuntime,
    path: str | PathLike[str],
    averages: Mapping[str, AveragedWeights | None],
    *,
    overwrite: bool,
    trainable_only: bool,
) -> None:
    """Write the weights of a trainer, or their averages, to a safetensors file. A collective.

    Args:
        trainer: The trainer.
        distributed: Its process group.
        path: Path or URL of the file.
        averages: The averages to write instead of the weights, by their name, None if there are none; or empty.
        overwrite: Whether to replace an existing file.
        trainable_only: Whether to leave out frozen parameters and buffers.

    Raises:
        CheckpointError: The file exists, or no parameter is trained.
    """
    target = resolve_links(parse_path(path))
    filesystem, is_main = select_filesystem(target), distributed.rank == 0
    names = find_trained(trainer) if trainable_only else None
    with distributed.synced("export_model()"), as_checkpoint_error(target):
        if names is not None and not names:
            raise CheckpointError("export_model(trainable_only=True): all parameters are frozen.")
        if is_main:
            check_target(filesystem, target, overwrite=overwrite)
    states = states_to_export(
        trainer, {part: found.state_dict() for part, found in averages.items() if found is not None}, names
    )
    with distributed.synced("the writing of export_model()"):
        if is_main:
            tensors = exported_weights(states, next(iter(averages), None))
            write_weights(filesystem, target, tensors, overwrite=overwrite)


def states_to_export(
    trainer: TrainerCore, averages: Mapping[str, Any], names: Collection[str] | None = None
) -> Snapshot:
    """Return a trainer's weights, or those with some names, and averages. A collective; rank 0 gets full tensors."""

    def gather(value: Any) -> Any:
        if not is_dtensor(value):
            return value
        full = full_tensor(value)
        return full.cpu() if trainer.distributed.rank == 0 else None

    def collect(weights: Mapping[str, Any]) -> Any:
        chosen = {name: weight for name, weight in weights.items() if names is None or name in names}
        return map_state({MODEL: chosen, **averages}, gather)

    if not trainer.is_running:
        return Snapshot(collect(get_weights(trainer.unwrapped_model)))
    modes = trainer.run.optimizer_modes
    with modes.evaluating():
        states = collect(trainer.run.engine.get_state().weights)
        return Snapshot(copy.deepcopy(states) if modes.has_any else states)  # train mode changes them after the block


def exported_weights(snapshot: Snapshot, averages: str | None = None) -> dict[str, Tensor]:
    """Return what `model.load_state_dict()` takes: a tensor for each name in the model's `state_dict()`.

    Args:
        snapshot: The shared parts of a checkpoint, or what `states_to_export` returned.
        averages: The part with the averages to export, such as `"ema"`. A tensor without an average is exported as it
            is, unless it is tied to one with an average: then both get the average.

    Raises:
        MissingPartError: The snapshot has no such part.
        CheckpointError: The part does not contain weights, or averages that were never updated.
    """
    weights = require_tensors(snapshot[MODEL], MODEL)
    if averages is None:
        return weights
    state = snapshot[averages]
    if not holds_averages(state):
        raise CheckpointError(f"The part {averages!r} does not contain averaged weights.")
    if not state["updates"]:
        raise CheckpointError(
            f"The averages {averages!r} have not been updated yet: export the weights, or a later checkpoint."
        )
    by_name = require_tensors(state["averages"], averages)
    # Of tied weights, only one name has an average. Buffers that are not persistent have an average, but no weight.
    by_memory = {get_memory_key(weights[name]): average for name, average in by_name.items() if name in weights}
    return {
        name: by_name.get(name, by_memory.get(get_memory_key(weight), weight)).to(weight.dtype)
        for name, weight in weights.items()
    }


def require_tensors(state: object, part: str) -> dict[str, Tensor]:
    """Return a state as tensors by name, or raise `CheckpointError`."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"The part {part!r} is a {type(state).__name__}: weights must be tensors by name.")
    for name, value in state.items():
        if not isinstance(value, Tensor) or name == "__metadata__":  # a key that the format reserves
            raise CheckpointError(
                f"{part}[{name!r}] is a {type(value).__name__}, which a safetensors file cannot store under that "
                "name. If it is the extra state of a module, let its get_extra_state() return a tensor."
            )
    return dict(state)


def write_weights(
    filesystem: FileSystem, path: str, tensors: Mapping[str, Tensor], *, overwrite: bool = False
) -> FileDigest:
    """Write tensors to a safetensors file, durably. The file appears complete.

    Raises:
        CheckpointError: The path is taken, unsuitable or cannot be written, or the format has no such dtype.
    """
    check = partial(check_target, filesystem, path, overwrite=overwrite)
    with as_checkpoint_error(f"{path} was not written"):
        digest = filesystem.replace_file(path, safetensors_parts(tensors), check)
        filesystem.sync_directory(split_path(path)[0])
    return digest


def check_target(filesystem: FileSystem, path: str, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if weights cannot be written to a path."""
    directory, name = split_path(path)
    if not is_url(path) and not filesystem.is_directory(directory):
        raise CheckpointError(
            f"The directory {directory} does not exist, so {name} cannot be written to it: create it first."
        )
    if filesystem.exists(f"{directory}/{MANIFEST}"):
        raise CheckpointError(f"{path} is in a checkpoint, which another file would damage: choose another directory.")
    kind = filesystem.get_kind(path)
    if kind is not None and kind != "file":
        raise CheckpointError(f"{path} exists and is not a regular file: choose another name.")
    if kind is not None and not overwrite:
        raise CheckpointError(f"{path} exists already: choose another name, or replace it by overwrite=True (--force).")

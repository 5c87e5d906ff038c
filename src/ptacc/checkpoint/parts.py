"""Snapshots: what a checkpoint holds, in parts, and how they become its files and come back.

```
shared parts (model, optimizer, ...)   of rank 0      -> shared.json, shared.safetensors
own parts (random states, ...)         of each rank   -> rank-3.json, rank-3.safetensors
```

A part is a name, the version of its form, and a state. Versions stand in the manifest, so that a later form of a
state can tell an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ptacc.checkpoint.serialization.json_codec import Encoded, Json, brief, decode, encode
from ptacc.checkpoint.serialization.safetensors_file import parse_safetensors, safetensors_header, safetensors_parts
from ptacc.checkpoint.storage.filesystem import Written
from ptacc.checkpoint.storage.manifest import Manifest
from ptacc.checkpoint.storage.store import CheckpointStore, PendingCheckpoint
from ptacc.errors import CheckpointError, DamagedCheckpointError, MissingPartError
from ptacc.tensors.dtensor import localize, map_state, merge_states

SHARED = "shared"
"""The name of the files that all processes read."""
SHARDS = "shards"
"""A process's own part, in which it has its shards of those parts in common that are dealt over the processes."""
LARGEST_TREE = 1 << 28
"""Bytes of JSON that a file of parts may have: in memory they take up to thirty times that. Tensors are not in it."""


@dataclass(frozen=True)
class Part:
    """One part of a snapshot.

    Args:
        name: What errors and manifests call it.
        state: What a `state_dict()` returned.
        version: Of the form of the state.
    """

    name: str
    state: object
    version: int = 1


@dataclass(frozen=True)
class Snapshot:
    """The states in a checkpoint, by the names of their parts."""

    states: Mapping[str, Any] = field(default_factory=dict)

    def take(self, name: str) -> Any:
        """Return the state of a part.

        Raises:
            MissingPartError: The checkpoint has no such part.
        """
        if name not in self.states:
            raise MissingPartError(
                f"The checkpoint has no part {name!r}, and this run needs it. It has: "
                f"{', '.join(sorted(self.states))}. To go on without it, waive it by its name."
            )
        return self.states[name]

    def joined(self, parts: Mapping[str, Any]) -> Snapshot:
        """Return the snapshot with further parts."""
        return Snapshot({**self.states, **parts})

    def mapped(self, change: Callable[[Any], Any]) -> Snapshot:
        """Return the snapshot with each value in it changed."""
        return Snapshot(map_state(dict(self.states), change))


def own(rank: int) -> str:
    """Return the name of the files of one process."""
    return f"rank-{rank}"


@dataclass(frozen=True)
class EncodedParts:
    """Parts as they are written: trees by the parts' names, and the tensors in them by their keys."""

    trees: Mapping[str, Json]
    tensors: Mapping[str, Tensor]


def encode_parts(parts: Iterable[Part]) -> EncodedParts:
    """Encode parts, their tensors by reference.

    Raises:
        CheckpointError: A state cannot be stored; the message says which, and where.
    """
    encoded = {part.name: encode(part.state, part.name) for part in parts}
    tensors = {key: tensor for one in encoded.values() for key, tensor in one.tensors.items()}
    return EncodedParts({name: one.tree for name, one in encoded.items()}, tensors)


def check_storable(parts: Iterable[Part]) -> None:
    """Raise `CheckpointError` for a state that cannot be stored, or does not come back: at the start, not at a save.

    No tensor is copied for it.
    """
    for part in parts:
        encoded = encode(part.state, part.name)
        safetensors_header(encoded.tensors)
        tree = json.loads(json.dumps(encoded.tree, allow_nan=False))
        again = encode(decode(Encoded(tree, encoded.tensors)), part.name)
        if again.tree != encoded.tree:
            raise CheckpointError(f"{part.name} does not come back from a file as it was.")


def write_parts(
    store: CheckpointStore, draft: PendingCheckpoint, name: str, parts: Iterable[Part]
) -> dict[str, Written]:
    """Write parts to two files of a checkpoint, and return them as they were written."""
    return write_encoded(store, draft, name, encode_parts(parts))


def write_encoded(
    store: CheckpointStore, draft: PendingCheckpoint, name: str, parts: EncodedParts
) -> dict[str, Written]:
    """Write parts that are encoded already."""
    text = json.dumps(parts.trees, allow_nan=False).encode()
    if len(text) > LARGEST_TREE:
        raise CheckpointError(
            f"The states of {', '.join(parts.trees)} take {len(text)} bytes beside their tensors, and the most is "
            f"{LARGEST_TREE}: keep what is long in them, such as a list of numbers, as a tensor."
        )
    files = {f"{name}.json": store.write(draft, f"{name}.json", [text])}
    if parts.tensors:
        files[f"{name}.safetensors"] = store.write(draft, f"{name}.safetensors", safetensors_parts(parts.tensors))
    return files


def read_parts(store: CheckpointStore, manifest: Manifest, name: str) -> Snapshot:
    """Read parts back, each file checked before it is parsed.

    Raises:
        DamagedCheckpointError: A file is missing, or is not what was written.
        CheckpointError: A file is larger than any may be, or than there is memory.
    """
    try:
        return _read_parts(store, manifest, name)
    except MemoryError as error:
        raise CheckpointError(f"{manifest.name}/{name} needs more memory than there is.") from error


def read_whole(store: CheckpointStore, manifest: Manifest) -> Snapshot:
    """Read the parts in common, those that are dealt over the processes put together."""
    shared = read_parts(store, manifest, SHARED)
    if manifest.parts.keys() <= shared.states.keys():
        return shared
    theirs = [read_parts(store, manifest, own(rank)) for rank in range(manifest.world_size)]
    return shared.joined(shards_together(theirs)).mapped(lambda value: localize(value, {}))


def shards_together(theirs: Sequence[Snapshot]) -> dict[str, Any]:
    """Put the parts that are dealt over processes together of what all of these have of their own."""
    parts: dict[str, Any] = merge_states([one.states.get(SHARDS, {}) for one in theirs])
    return parts


def _read_parts(store: CheckpointStore, manifest: Manifest, name: str) -> Snapshot:
    written = manifest.files.get(f"{name}.json")
    if written is not None and written.size > LARGEST_TREE:
        raise CheckpointError(f"{manifest.name}/{name}.json has {written.size} bytes, and {LARGEST_TREE} are the most.")
    try:
        trees = json.loads(store.read(manifest, f"{name}.json"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{manifest.name}/{name}.json is no JSON: {brief(error)}.") from error
    if not isinstance(trees, dict):
        raise DamagedCheckpointError(f"{manifest.name}/{name}.json holds no parts.")
    file = f"{name}.safetensors"
    tensors = parse_safetensors(store.read(manifest, file), file) if file in manifest.files else {}
    return Snapshot({part: decode(Encoded(tree, tensors)) for part, tree in trees.items()})

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptacc.checkpoint.codec import Encoded, Json, decode, encode
from ptacc.checkpoint.disk import Written
from ptacc.checkpoint.manifest import Manifest
from ptacc.checkpoint.store import CheckpointStore, Draft
from ptacc.checkpoint.tensors import parse_safetensors, safetensors_parts
from ptacc.errors import DamagedCheckpointError, MissingPartError

SHARED = "shared"
"""The name of the files that all processes read."""


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


def own(rank: int) -> str:
    """Return the name of the files of one process."""
    return f"rank-{rank}"


def check_storable(parts: Iterable[Part]) -> None:
    """Raise `CheckpointError` for a state that cannot be stored, or does not come back: at the start, not at a save."""
    for part in parts:
        encoded = encode(part.state, part.name)
        json.dumps(encoded.tree, allow_nan=False)
        for _ in safetensors_parts(encoded.tensors):
            pass


def write_parts(store: CheckpointStore, draft: Draft, name: str, parts: Sequence[Part]) -> dict[str, Written]:
    """Write parts to two files of a checkpoint, and return them as they were written."""
    trees: dict[str, Json] = {}
    tensors: dict[str, Any] = {}
    for part in parts:
        encoded = encode(part.state, part.name)
        trees[part.name] = encoded.tree
        tensors |= encoded.tensors
    text = json.dumps(trees, allow_nan=False).encode()
    files = {f"{name}.json": store.write(draft, f"{name}.json", [text])}
    if tensors:
        files[f"{name}.safetensors"] = store.write(draft, f"{name}.safetensors", safetensors_parts(tensors))
    return files


def read_parts(store: CheckpointStore, manifest: Manifest, name: str) -> Snapshot:
    """Read parts back, each file checked before it is parsed.

    Raises:
        DamagedCheckpointError: A file is missing, or is not what was written.
    """
    try:
        trees = json.loads(store.read(manifest, f"{name}.json"))
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{manifest.name}/{name}.json is no JSON: {error}.") from error
    if not isinstance(trees, dict):
        raise DamagedCheckpointError(f"{manifest.name}/{name}.json holds no parts.")
    file = f"{name}.safetensors"
    tensors = parse_safetensors(store.read(manifest, file), file) if file in manifest.files else {}
    return Snapshot({part: decode(Encoded(tree, tensors)) for part, tree in trees.items()})

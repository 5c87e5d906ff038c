"""The parts of a checkpoint, and how they are written to its files and read back.

```
shared parts (model, optimizer, ...)    written by rank 0       shared.json, shared.safetensors
own parts (random states, ...)          written by each rank    rank-3.json, rank-3.safetensors
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ptacc.errors import CheckpointError, DamagedCheckpointError, MissingPartError
from ptacc.files.filesystem import FileDigest
from ptacc.serialization.json_codec import Encoded, Json, decode, encode, one_line
from ptacc.serialization.safetensors_file import parse_safetensors, safetensors_header, safetensors_parts
from ptacc.storage.manifest import Manifest
from ptacc.storage.store import CheckpointStore, PendingCheckpoint
from ptacc.tensors.dtensor import localize, map_state, merge_states

RUN, MODEL, BUFFERS, OPTIONS = "run", "model", "buffers", "options"
"""The parts with the state of the run, the weights, the model's other buffers, and the modules among the options."""
KINDS = "kinds"
"""The part with the class of each mixin's state."""
SHARED = "shared"
"""The name of the files that all ranks read."""
SHARDS = "shards"
"""The own part of a rank with its shards of those shared parts that contain sharded tensors."""
MAX_JSON_SIZE = 1 << 28
"""Bytes of JSON in one file. Parsed, they take up to thirty times as much memory. Tensors are in another file."""


class Snapshot(dict[str, Any]):
    """States that were read from a checkpoint, by the names of their parts."""

    def __missing__(self, name: str) -> Any:
        raise MissingPartError(
            f"The checkpoint has no part {name!r}. It has: {', '.join(sorted(self)) or 'no parts'}. "
            "To resume a run without it, add its name to resume_ignore."
        )


def rank_files(rank: int) -> str:
    """Return the name of the files of one rank."""
    return f"rank-{rank}"


def encode_parts(parts: Mapping[str, object]) -> Encoded:
    """Encode the states of parts by their names, with the errors of `encode`. Tensors are not copied."""
    encoded = {name: encode(state, name) for name, state in parts.items()}
    tensors = {key: tensor for one in encoded.values() for key, tensor in one.tensors.items()}
    return Encoded({name: one.tree for name, one in encoded.items()}, tensors)


def check_storable(parts: Mapping[str, object]) -> None:
    """Raise `CheckpointError` for a state that cannot be stored or would be read back differently."""
    for name, state in parts.items():
        encoded = encode(state, name)
        safetensors_header(encoded.tensors)
        tree = json.loads(json.dumps(encoded.tree, allow_nan=False))
        if encode(decode(Encoded(tree, encoded.tensors)), name).tree != encoded.tree:
            raise CheckpointError(f"{name} would be read back from a file differently from how it was saved.")


def write_parts(store: CheckpointStore, pending: PendingCheckpoint, name: str, parts: Encoded) -> dict[str, FileDigest]:
    """Write encoded parts to two files of a checkpoint, and return the digest of each."""
    text = json.dumps(parts.tree, allow_nan=False).encode()
    if len(text) > MAX_JSON_SIZE:
        names = ", ".join(cast(Mapping[str, Json], parts.tree))
        raise CheckpointError(
            f"The states of {names} take {len(text)} bytes without their tensors, but the limit is {MAX_JSON_SIZE}: "
            "store what is long in them, such as a list of numbers, as a tensor."
        )
    files = {f"{name}.json": store.write(pending, f"{name}.json", [text])}
    if parts.tensors:
        file = f"{name}.safetensors"
        files[file] = store.write(pending, file, safetensors_parts(parts.tensors))
    return files


def read_parts(store: CheckpointStore, manifest: Manifest, name: str) -> Snapshot:
    """Read parts. The hash of each file is checked before it is parsed.

    Raises:
        DamagedCheckpointError: A file is missing or has changed.
        CheckpointError: A file is too large for the limit or the memory.
    """
    json_file, tensor_file = f"{name}.json", f"{name}.safetensors"
    digest = manifest.files.get(json_file)
    if digest is not None and digest.size > MAX_JSON_SIZE:
        raise CheckpointError(f"{manifest.name}/{json_file} has {digest.size} bytes, but the limit is {MAX_JSON_SIZE}.")
    try:
        trees = json.loads(store.read(manifest, json_file))
        if not isinstance(trees, dict):
            raise DamagedCheckpointError(f"{manifest.name}/{json_file} does not contain parts.")
        has_tensors = tensor_file in manifest.files
        tensors = parse_safetensors(store.read(manifest, tensor_file), tensor_file) if has_tensors else {}
        return Snapshot({part: decode(Encoded(tree, tensors)) for part, tree in trees.items()})
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{manifest.name}/{json_file} is not valid JSON: {one_line(error)}.") from error
    except MemoryError as error:
        raise CheckpointError(f"{manifest.name}/{name} needs more memory than there is.") from error


def read_full_parts(store: CheckpointStore, manifest: Manifest) -> Snapshot:
    """Read the shared parts, with sharded tensors assembled from the files of all ranks."""
    shared = read_parts(store, manifest, SHARED)
    if shared.keys() >= {*manifest.parts}:
        return shared
    shards = merge_shards(read_all_ranks(store, manifest))
    return Snapshot(map_state({**shared, **shards}, lambda value: localize(value, {})))


def read_all_ranks(store: CheckpointStore, manifest: Manifest) -> list[Snapshot]:
    """Read the own parts of each rank that saved a checkpoint."""
    return [read_parts(store, manifest, rank_files(rank)) for rank in range(manifest.world_size)]


def merge_shards(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """Return the shared parts that contain sharded tensors, from the own parts of all ranks."""
    return cast(dict[str, Any], merge_states([snapshot.get(SHARDS, {}) for snapshot in snapshots]))

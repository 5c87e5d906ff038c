"""The codec: converts states to JSON and tensors, and back. Decoding never runs code.

JSON by itself turns integer keys into strings and tuples into lists, and has no infinity. Here, values that JSON does
not distinguish are tagged. The set of tags is fixed: encoding fails for a value of another type, and decoding fails for
an unknown tag.

```
state -> encode() -> Encoded(tree: JSON, tensors: by key) -> decode() -> an equal state
```
"""

from __future__ import annotations

import base64
import math
import re
import reprlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ptacc.errors import CheckpointError, DamagedCheckpointError
from ptacc.tensors.dtensor import Shard, ShardingSpec, get_shard, is_dtensor

_ValueT = TypeVar("_ValueT")
Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

TAG: Final = "~"
"""The key of a tag. A user's dictionary with this key is itself tagged."""
MAX_DEPTH: Final = 64
"""How deep the containers of a state may be nested."""
DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
NUMERIC: Final = "biufc"
"""Kinds of numeric NumPy dtypes."""
ARRAY_DTYPE: Final = re.compile(rf"[<>|=][{NUMERIC}][0-9]{{1,2}}")
"""NumPy's names of numeric dtypes. For other strings, NumPy imports modules, parses Python, or warns."""
MAPPINGS: Final[dict[type, str]] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
SEQUENCES: Final[dict[type, str]] = {tuple: "tuple", torch.Size: "Size", set: "set", frozenset: "frozenset"}
CONTAINERS: Final[Mapping[str, Callable[[Any], object]]] = {tag: kind for kind, tag in (MAPPINGS | SEQUENCES).items()}


@dataclass
class Encoded:
    """An encoded state.

    Args:
        tree: The state as JSON, with tensors replaced by their keys.
        tensors: The tensors by their keys, not copied. A tensor that the state holds twice has one key.
    """

    tree: Json
    tensors: dict[str, Tensor] = field(default_factory=dict)


def encode(state: object, name: str = "state") -> Encoded:
    """Encode numbers, strings, bytes, tensors, arrays, dtypes, devices, and containers of them.

    The name is that of the state, for errors and for the keys of tensors.

    Raises:
        CheckpointError: A value cannot be stored; the message says which.

    Example:
        >>> encode({30: (1, float("inf"))}).tree
        {'~': 'dict', 'items': [[30, {'~': 'tuple', 'items': [1, {'~': 'float', 'value': 'inf'}]}]]}
    """
    encoder = _Encoder(name)
    tree = encoder.encode(state, name, 0)
    return Encoded(tree, encoder.tensors)


def decode(encoded: Encoded) -> Any:
    """Decode what `encode` returned. Raise `DamagedCheckpointError` for anything else.

    Example:
        >>> decode(encode({30: (1, float("inf"))}))
        {30: (1, inf)}
    """
    try:
        return _Decoder(encoded.tensors).decode(encoded.tree, 0)
    except RecursionError as error:
        raise DamagedCheckpointError("The containers of a state are nested too deeply to be read.") from error


def one_line(error: Exception) -> str:
    """Return the start of an error's message in printable characters, since it may quote hostile content."""
    return ascii(f"{type(error).__name__}: {error}"[:200])[1:-1]


def get_memory_key(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that is the same for two tensors with the same memory, dtype and layout."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


# ---- encoding


@dataclass
class _Encoder:
    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _keys: dict[tuple[object, ...], str] = field(default_factory=dict)

    def encode(self, value: Any, path: str, depth: int) -> Json:
        """Encode one value. `path` is its expression in errors, such as `state['a'][0]`."""
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{path}: containers are nested more than {MAX_DEPTH} deep. Does one contain itself?")
        kind = type(value)  # the exact type: an instance of a subclass would be decoded as one of its base
        if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
            return cast(Json, value)
        if kind in MAPPINGS:
            return self._encode_mapping(value, path, depth)
        if kind is list or kind in SEQUENCES:
            parts = sorted(value, key=repr) if kind in (set, frozenset) else value
            items = [self.encode(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(parts)]
            return items if kind is list else {TAG: SEQUENCES[kind], "items": items}
        if kind in LEAVES:
            tag, to_json, _ = LEAVES[kind]
            return {TAG: tag, "value": to_json(value)}
        if isinstance(value, Shard) or is_dtensor(value):
            return self._encode_shard(value if isinstance(value, Shard) else get_shard(value), path)
        if isinstance(value, Tensor):
            return {TAG: "tensor", "key": self._add_tensor(value, path)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in NUMERIC:
            # As bytes, since torch does not have all dtypes of NumPy.
            array = np.ascontiguousarray(value)
            key = self._add_tensor(torch.from_numpy(array.reshape(-1).view(np.uint8).copy()), path)
            tag = "array" if isinstance(value, np.ndarray) else "number"
            return {TAG: tag, "key": key, "dtype": value.dtype.str, "shape": [*value.shape]}
        raise CheckpointError(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored. A state may contain numbers, "
            "strings, bytes, tensors, arrays, dtypes and devices, in lists, tuples, sets and dictionaries: let "
            "state_dict() return values from which load_state_dict() can restore this one."
        )

    def _encode_mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Json:
        parts = [(key, self.encode(part, f"{path}[{key!r}]", depth + 1)) for key, part in value.items()]
        if type(value) is dict and TAG not in value and all(type(key) is str for key in value):
            return dict(parts)
        items: Json = [[self.encode(key, path, depth + 1), part] for key, part in parts]
        return {TAG: MAPPINGS[type(value)], "items": items}

    def _encode_shard(self, shard: Shard, path: str) -> Json:
        ranges: Json = [[list(bounds) for bounds in dimension] for dimension in shard.index_ranges]
        sharding: dict[str, Json] = {"placements": [*shard.sharding.placements], "mesh": [*shard.sharding.mesh]}
        key = self._add_tensor(shard.local, path)
        return {TAG: "shard", "key": key, "shape": [*shard.shape], "ranges": ranges, **sharding}

    def _add_tensor(self, tensor: Tensor, path: str) -> str:
        """Add a tensor to those to be stored, unless it is one already as tied weights are, and return its key."""
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{path} is a tensor with the layout {tensor.layout}, quantized, or without data: store a dense tensor."
            )
        memory = get_memory_key(tensor)
        if tensor.numel() == 0 or memory not in self._keys:
            self._keys[memory] = f"{self.name}.{len(self.tensors)}"
            self.tensors[self._keys[memory]] = tensor.detach()
        return self._keys[memory]


# ---- decoding


@dataclass(frozen=True)
class _Decoder:
    tensors: Mapping[str, Tensor]

    def decode(self, tree: Json, depth: int) -> Any:
        if depth > 3 * MAX_DEPTH:  # a tagged dictionary takes three levels
            raise DamagedCheckpointError("The containers of a state are nested too deeply.")
        if isinstance(tree, list):
            return [self.decode(part, depth + 1) for part in tree]
        if not isinstance(tree, dict):
            return tree
        if TAG not in tree:
            return {key: self.decode(part, depth + 1) for key, part in tree.items()}
        try:
            return self._decode_tagged(tree, depth)
        except (DamagedCheckpointError, RecursionError, MemoryError):
            raise
        except Exception as error:  # NumPy and torch raise many types of errors for invalid values
            kind = reprlib.repr(tree[TAG])
            raise DamagedCheckpointError(
                f"The checkpoint contains a malformed {kind} value: {one_line(error)}."
            ) from error

    def _decode_tagged(self, tree: dict[str, Any], depth: int) -> Any:
        match tree[TAG]:
            case "tensor":
                return self.tensors[tree["key"]]
            case "shard":
                return self._decode_shard(tree)
            case "array":
                return self._decode_array(tree)
            case "number":
                return self._decode_array(tree)[()]
            case str(tag) if tag in CONTAINERS and isinstance(tree["items"], list):
                items = self.decode(tree["items"], depth + 1)
                if tag in MAPPINGS.values():
                    return CONTAINERS[tag](dict(items))
                return CONTAINERS[tag](_to_sizes(items) if tag == SEQUENCES[torch.Size] else items)
            case str(tag) if tag in FROM_JSON:
                return FROM_JSON[tag](tree["value"])
        raise DamagedCheckpointError(f"The checkpoint contains a value of unknown type {reprlib.repr(tree[TAG])}.")

    def _decode_shard(self, tree: dict[str, Any]) -> Shard:
        shape = tuple(_to_sizes(tree["shape"]))
        pairs = [[_to_sizes(run) for run in _expect(list, ranges)] for ranges in _expect(list, tree["ranges"])]
        runs = tuple(tuple((start, stop) for start, stop in ranges) for ranges in pairs)
        names = [tuple(_expect(str, name) for name in _expect(list, tree[part])) for part in ("placements", "mesh")]
        shard = Shard(self.tensors[tree["key"]], shape, runs, ShardingSpec(*names))
        if not shard.is_consistent:
            raise ValueError("its shape does not match its position")
        return shard

    def _decode_array(self, tree: dict[str, Any]) -> Any:
        """Return an array in the memory of its tensor: with a copy for each tag, a small file could fill the memory."""
        if not ARRAY_DTYPE.fullmatch(tree["dtype"]):
            raise ValueError("its dtype is not numeric")
        return self.tensors[tree["key"]].numpy().view(tree["dtype"]).reshape(_to_sizes(tree["shape"]))


def _expect(kind: type[_ValueT], value: object) -> _ValueT:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def _to_sizes(values: object) -> list[int]:
    sizes = [_expect(int, value) for value in _expect(list, values)]
    if not all(0 <= size < 2**63 for size in sizes):
        raise ValueError("invalid size")
    return sizes


def _to_complex(parts: object) -> complex:
    real, imag = (_Decoder({}).decode(part, 0) for part in _expect(list, parts))
    return complex(_expect(float, real), _expect(float, imag))


LEAVES: Final[Mapping[type, tuple[str, Callable[[Any], Json], Callable[[Any], object]]]] = {
    float: ("float", repr, {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.__getitem__),
    complex: ("complex", lambda value: [encode(value.real).tree, encode(value.imag).tree], _to_complex),
    bytes: (
        "bytes",
        lambda value: base64.b64encode(value).decode("ascii"),
        lambda text: base64.b64decode(_expect(str, text), validate=True),
    ),
    torch.dtype: ("dtype", lambda value: str(value).removeprefix("torch."), DTYPES.__getitem__),
    torch.device: ("device", str, lambda text: torch.device(_expect(str, text))),
}
"""Types without tensors or other values in them: their tags, and the conversions to JSON and back."""
FROM_JSON: Final = {tag: from_json for tag, _, from_json in LEAVES.values()}

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
FLOATS: Final = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
MAPPINGS: Final[Mapping[type, str]] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
SEQUENCES: Final[Mapping[type, str]] = {tuple: "tuple", torch.Size: "Size", set: "set", frozenset: "frozenset"}
CONTAINERS: Final[Mapping[str, Callable[[Any], object]]] = {
    name: kind for kind, name in (*MAPPINGS.items(), *SEQUENCES.items())
}


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
    """Encode a state.

    Args:
        state: Numbers, strings, bytes, tensors, arrays, dtypes, devices, and containers of them.
        name: The name of the state in errors, and the prefix of the keys of tensors.

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
    """Decode what `encode` returned, or what was read from a file.

    Raises:
        DamagedCheckpointError: `encode` cannot have returned it.

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

    def encode(self, value: object, path: str, depth: int) -> Json:
        """Encode one value. `path` is its expression in errors, such as `state['a'][0]`."""
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{path}: containers are nested more than {MAX_DEPTH} deep. Does one contain itself?")
        if isinstance(value, Tensor):
            if is_dtensor(value):
                return self._encode_shard(get_shard(value), path)
            return {TAG: "tensor", "key": self._add_tensor(value, path)}
        kind = type(value)  # the exact type: an instance of a subclass would be decoded as one of its base
        if value is None or (isinstance(value, bool | str | int) and kind in (bool, str, int)):
            return cast(Json, value)
        if isinstance(value, float) and kind is float:
            return value if math.isfinite(value) else {TAG: "float", "value": repr(value)}
        if isinstance(value, dict) and kind in MAPPINGS:
            return self._encode_mapping(value, kind, path, depth)
        if isinstance(value, list) and kind is list:
            return [self.encode(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(value)]
        if isinstance(value, tuple | set | frozenset) and kind in SEQUENCES:
            parts = list(value) if isinstance(value, tuple) else sorted(value, key=repr)
            items: Json = [self.encode(part, f"{path}[{i}]", depth + 1) for i, part in enumerate(parts)]
            return {TAG: SEQUENCES[kind], "items": items}
        return self._encode_leaf(value, path)

    def _encode_shard(self, shard: Shard, path: str) -> Json:
        """Encode a shard with its position in the tensor."""
        runs: Json = [[list(run) for run in ranges] for ranges in shard.runs]
        dealing: dict[str, Json] = {"placements": [*shard.dealing.placements], "mesh": [*shard.dealing.mesh]}
        key = self._add_tensor(shard.local, path)
        return {TAG: "shard", "key": key, "shape": [*shard.shape], "runs": runs, **dealing}

    def _encode_mapping(self, value: Mapping[Any, Any], kind: type, path: str, depth: int) -> Json:
        parts = [(key, self.encode(part, f"{path}[{key!r}]", depth + 1)) for key, part in value.items()]
        if kind is dict and TAG not in value and all(type(key) is str for key in value):
            return dict(parts)
        return {TAG: MAPPINGS[kind], "items": [[self.encode(key, path, depth + 1), part] for key, part in parts]}

    def _encode_leaf(self, value: object, path: str) -> Json:
        if isinstance(value, Shard):
            return self._encode_shard(value, path)
        if isinstance(value, bytes) and type(value) is bytes:
            return {TAG: "bytes", "value": base64.b64encode(value).decode("ascii")}
        if isinstance(value, complex) and type(value) is complex:
            return {TAG: "complex", "value": [self.encode(part, path, 0) for part in (value.real, value.imag)]}
        if isinstance(value, torch.dtype):
            return {TAG: "dtype", "value": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {TAG: "device", "value": str(value)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in NUMERIC:
            # As bytes, since torch does not have all dtypes of NumPy.
            array = np.ascontiguousarray(value)
            key = self._add_tensor(torch.from_numpy(array.reshape(-1).view(np.uint8).copy()), path)
            tag = "array" if isinstance(value, np.ndarray) else "number"
            return {TAG: tag, "key": key, "dtype": value.dtype.str, "shape": [*value.shape]}
        raise CheckpointError(
            f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored. A state may "
            "contain numbers, strings, bytes, tensors, arrays, dtypes and devices, in lists, tuples, sets and "
            "dictionaries: let state_dict() return values from which load_state_dict() can restore this one."
        )

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
        """Decode one value."""
        if depth > 3 * MAX_DEPTH:  # a tagged dictionary takes three levels
            raise DamagedCheckpointError("The containers of a state are nested too deeply.")
        if isinstance(tree, list):
            return [self.decode(part, depth + 1) for part in tree]
        if not isinstance(tree, dict):
            return tree
        if TAG not in tree:
            return {key: self.decode(part, depth + 1) for key, part in tree.items()}
        try:
            return self._tagged(tree, depth)
        except (DamagedCheckpointError, RecursionError, MemoryError):
            raise
        except Exception as error:  # NumPy and torch raise many types of errors for invalid values
            kind = reprlib.repr(tree[TAG])
            raise DamagedCheckpointError(
                f"The checkpoint contains a malformed {kind} value: {one_line(error)}."
            ) from error

    def _tagged(self, tree: dict[str, Any], depth: int) -> Any:
        match tree[TAG]:
            case "tensor":
                return self.tensors[tree["key"]]
            case "shard":
                return self._shard(tree)
            case "array":
                return self._array(tree)
            case "number":
                return self._array(tree)[()]
            case str(tag) if tag in CONTAINERS and isinstance(tree["items"], list):
                items = self.decode(tree["items"], depth + 1)
                return _container(tag, items)
            case str(tag) if tag in LEAVES:
                return LEAVES[tag](tree["value"])
        raise DamagedCheckpointError(f"The checkpoint contains a value of unknown type {reprlib.repr(tree[TAG])}.")

    def _shard(self, tree: dict[str, Any]) -> Shard:
        shape = tuple(_sizes(tree["shape"]))
        pairs = [[_sizes(run) for run in _checked(list, ranges)] for ranges in _checked(list, tree["runs"])]
        runs = tuple(tuple((start, stop) for start, stop in ranges) for ranges in pairs)
        names = [tuple(_checked(str, name) for name in _checked(list, tree[part])) for part in ("placements", "mesh")]
        shard = Shard(self.tensors[tree["key"]], shape, runs, ShardingSpec(*names))
        if not shard.is_consistent:
            raise ValueError("its shape does not match its position")
        return shard

    def _array(self, tree: dict[str, Any]) -> Any:
        """Return an array in the memory of its tensor: with a copy for each tag, a small file could fill the memory."""
        if not ARRAY_DTYPE.fullmatch(tree["dtype"]):
            raise ValueError("its dtype is not numeric")
        return self.tensors[tree["key"]].numpy().view(tree["dtype"]).reshape(_sizes(tree["shape"]))


def _checked(kind: type[_ValueT], value: object) -> _ValueT:
    if type(value) is not kind:
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def _complex(parts: object) -> complex:
    real, imag = (_Decoder({}).decode(part, 0) for part in _checked(list, parts))
    return complex(_checked(float, real), _checked(float, imag))


LEAVES: Final[Mapping[str, Callable[[Any], object]]] = {
    "float": FLOATS.__getitem__,
    "complex": _complex,
    "bytes": lambda value: base64.b64decode(_checked(str, value), validate=True),
    "dtype": DTYPES.__getitem__,
    "device": lambda value: torch.device(_checked(str, value)),
}
"""Makes the values of the tags without tensors or other values in them."""


def _container(tag: str, items: list[Any]) -> object:
    if tag in MAPPINGS.values():
        return CONTAINERS[tag](dict(items))
    return CONTAINERS[tag](_sizes(items) if tag == SEQUENCES[torch.Size] else items)


def _sizes(values: object) -> list[int]:
    sizes = [_checked(int, value) for value in _checked(list, values)]
    if not all(0 <= size < 2**63 for size in sizes):
        raise ValueError("invalid size")
    return sizes

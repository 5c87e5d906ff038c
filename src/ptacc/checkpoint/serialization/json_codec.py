"""The codec: states to JSON and tensors, and back to what they were. Nothing is ever run by reading.

JSON by itself turns a dictionary's whole-number keys into strings, tuples into lists, and knows no infinity. Here what
JSON cannot tell apart is tagged, and the set of tags is closed: a value of any other kind is refused when it is
written, and a tag that is unknown when it is read.

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
from collections.abc import Callable, Collection, Mapping
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
"""The key that marks what is no plain JSON. A dictionary of the user's that has it is tagged itself."""
DEEPEST: Final = 64
"""Containers in containers that a state may have."""
DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
NUMERIC: Final = "biufc"
"""Kinds of NumPy dtypes that are numbers."""
ARRAY_DTYPE: Final = re.compile(rf"[<>|=][{NUMERIC}][0-9]{{1,2}}")
"""What NumPy calls a dtype of numbers; given other texts, it imports, parses Python, or warns."""
COLLISIONS: Final = 256
"""Keys of one hash that a dictionary or set may have: n of them are made one by comparing n² / 2 times."""
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
        tree: The state as JSON, tensors by their keys.
        tensors: The tensors, on the devices they were on; one key for each, however often the state holds it.
    """

    tree: Json
    tensors: dict[str, Tensor] = field(default_factory=dict)


def encode(state: object, name: str = "state") -> Encoded:
    """Encode a state.

    Args:
        state: Numbers, strings, bytes, tensors, arrays, dtypes, devices, and containers of them.
        name: What errors call it; keys of tensors begin with it.

    Raises:
        CheckpointError: Something in it cannot be stored; the message says what, and where.

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
        DamagedCheckpointError: It is nothing that `encode` returns.

    Example:
        >>> decode(encode({30: (1, float("inf"))}))
        {30: (1, inf)}
    """
    try:
        return _Decoder(encoded.tensors).decode(encoded.tree, 0)
    except RecursionError as error:
        raise DamagedCheckpointError("A state has more containers in each other than can be read.") from error


def brief(error: Exception) -> str:
    """Return what an error says, in a line: of hostile content some say much, and some what cannot be printed."""
    return ascii(f"{type(error).__name__}: {error}"[:200])[1:-1]


# ---- encoding


@dataclass
class _Encoder:
    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _keys: dict[tuple[object, ...], str] = field(default_factory=dict)

    def encode(self, value: object, place: str, depth: int) -> Json:
        """Encode one value, found at `place`."""
        if depth > DEEPEST:
            raise CheckpointError(f"{place}: more than {DEEPEST} containers in each other. Is it in itself?")
        if isinstance(value, Tensor):
            if is_dtensor(value):
                return self._encode_shard(get_shard(value), place)
            return {TAG: "tensor", "key": self._keep(value, place)}
        kind = type(value)  # exactly: a subclass would come back as what it derives from
        if value is None or (isinstance(value, bool | str | int) and kind in (bool, str, int)):
            return cast(Json, value)
        if isinstance(value, float) and kind is float:
            return value if math.isfinite(value) else {TAG: "float", "value": repr(value)}
        if isinstance(value, dict) and kind in MAPPINGS:
            return self._encode_mapping(value, kind, place, depth)
        if isinstance(value, list) and kind is list:
            return [self.encode(part, f"{place}[{i}]", depth + 1) for i, part in enumerate(value)]
        if isinstance(value, tuple | set | frozenset) and kind in SEQUENCES:
            parts = list(value) if isinstance(value, tuple) else sorted(value, key=repr)
            items: Json = [self.encode(part, f"{place}[{i}]", depth + 1) for i, part in enumerate(parts)]
            return {TAG: SEQUENCES[kind], "items": items}
        return self._encode_leaf(value, place)

    def _encode_shard(self, shard: Shard, place: str) -> Json:
        """Encode a part of a tensor with its place in the whole."""
        runs: Json = [[list(run) for run in of_dimension] for of_dimension in shard.index_ranges]
        dealing: dict[str, Json] = {"placements": [*shard.sharding.placements], "mesh": [*shard.sharding.mesh]}
        key = self._keep(shard.local, place)
        return {TAG: "shard", "key": key, "shape": [*shard.shape], "runs": runs, **dealing}

    def _encode_mapping(self, value: Mapping[Any, Any], kind: type, place: str, depth: int) -> Json:
        parts = [(key, self.encode(part, f"{place}[{key!r}]", depth + 1)) for key, part in value.items()]
        if kind is dict and TAG not in value and all(type(key) is str for key in value):
            return dict(parts)
        return {TAG: MAPPINGS[kind], "items": [[self.encode(key, place, depth + 1), part] for key, part in parts]}

    def _encode_leaf(self, value: object, place: str) -> Json:
        if isinstance(value, Shard):
            return self._encode_shard(value, place)
        if isinstance(value, bytes) and type(value) is bytes:
            return {TAG: "bytes", "value": base64.b64encode(value).decode("ascii")}
        if isinstance(value, complex) and type(value) is complex:
            return {TAG: "complex", "value": [self.encode(part, place, 0) for part in (value.real, value.imag)]}
        if isinstance(value, torch.dtype):
            return {TAG: "dtype", "value": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {TAG: "device", "value": str(value)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in NUMERIC:
            # As bytes of the machine's order, since torch does not have every dtype of NumPy's.
            array = np.ascontiguousarray(value)
            key = self._keep(torch.from_numpy(array.reshape(-1).view(np.uint8).copy()), place)
            tag = "array" if isinstance(value, np.ndarray) else "number"
            return {TAG: tag, "key": key, "dtype": value.dtype.str, "shape": [*value.shape]}
        raise CheckpointError(
            f"{place} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored. States are "
            "made of numbers, strings, bytes, tensors, arrays, dtypes and devices, in lists, tuples, sets and "
            "dictionaries: return from state_dict() what this can be made from again."
        )

    def _keep(self, tensor: Tensor, place: str) -> str:
        """Return the key of a tensor; one that is met again, as tied weights are, has the one it had."""
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise CheckpointError(
                f"{place} is a tensor of the layout {tensor.layout}, or without data: store it dense."
            )
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() == 0 or same not in self._keys:
            self._keys[same] = f"{self.name}.{len(self.tensors)}"
            self.tensors[self._keys[same]] = tensor.detach()
        return self._keys[same]


# ---- decoding


@dataclass(frozen=True)
class _Decoder:
    tensors: Mapping[str, Tensor]

    def decode(self, tree: Json, depth: int) -> Any:
        """Decode one value."""
        if depth > 3 * DEEPEST:  # a tagged dictionary is three lists deep
            raise DamagedCheckpointError("A state has containers in each other that no state has.")
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
        except Exception as error:  # NumPy and torch have many for what is none
            kind = reprlib.repr(tree[TAG])
            raise DamagedCheckpointError(f"A state holds a {kind} that is none: {brief(error)}.") from error

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
        raise DamagedCheckpointError(f"A state holds a value of the unknown kind {reprlib.repr(tree[TAG])}.")

    def _shard(self, tree: dict[str, Any]) -> Shard:
        shape = tuple(_sizes(tree["shape"]))
        pairs = [[_sizes(run) for run in _of(list, of_dimension)] for of_dimension in _of(list, tree["runs"])]
        runs = tuple(tuple((start, stop) for start, stop in of_dimension) for of_dimension in pairs)
        names = [tuple(_of(str, name) for name in _of(list, tree[part])) for part in ("placements", "mesh")]
        shard = Shard(self.tensors[tree["key"]], shape, runs, ShardingSpec(*names))
        if not shard.is_consistent:
            raise ValueError("its part is of another size than its place")
        return shard

    def _array(self, tree: dict[str, Any]) -> Any:
        """Return an array on the memory of its tensor: a copy for each tag would make of a small file what it likes."""
        if not ARRAY_DTYPE.fullmatch(tree["dtype"]):
            raise ValueError("its dtype is none of numbers")
        return self.tensors[tree["key"]].numpy().view(tree["dtype"]).reshape(_sizes(tree["shape"]))


def _of(kind: type[_ValueT], value: object) -> _ValueT:
    if type(value) is not kind:
        raise TypeError(f"it is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _complex(parts: object) -> complex:
    real, imag = (_Decoder({}).decode(part, 0) for part in _of(list, parts))
    return complex(_of(float, real), _of(float, imag))


LEAVES: Final[Mapping[str, Callable[[Any], object]]] = {
    "float": FLOATS.__getitem__,
    "complex": _complex,
    "bytes": lambda value: base64.b64decode(_of(str, value), validate=True),
    "dtype": DTYPES.__getitem__,
    "device": lambda value: torch.device(_of(str, value)),
}
"""What makes the values of these tags, which are none of tensors and hold no others."""


def _container(tag: str, items: list[Any]) -> object:
    if tag in MAPPINGS.values():
        _check_hashes([key for key, _ in items])
        return CONTAINERS[tag](dict(items))
    if tag == SEQUENCES[torch.Size]:
        return torch.Size(_sizes(items))
    if tag != SEQUENCES[tuple]:
        _check_hashes(items)
    return CONTAINERS[tag](items)


def _sizes(values: object) -> list[int]:
    """Return what are the sizes of dimensions."""
    sizes = [_of(int, value) for value in _of(list, values)]
    if not all(0 <= size < 2**63 for size in sizes):
        raise ValueError("a size is none")
    return sizes


def _check_hashes(keys: Collection[object]) -> None:
    """Raise `ValueError` for keys that somebody chose for their hash."""
    if max(Counter(map(hash, keys)).values(), default=0) > COLLISIONS:
        raise ValueError(f"more than {COLLISIONS} of its keys have one hash")

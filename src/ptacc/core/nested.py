"""Tensors in nested structures: tuples, lists, mappings, dataclasses, and objects with a `.to` of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import TypeVar

from ptacc.errors import DataError

NestedT = TypeVar("NestedT")


@runtime_checkable
class Movable(Protocol):
    """Something that moves itself to a device, as the batches of tokenizers do."""

    def to(self, device: torch.device, /) -> object:
        """Return this, on the device."""
        ...


def map_tensors(change: Callable[[Tensor], Any], structure: NestedT) -> NestedT:
    """Rebuild `structure` with `change` applied to each tensor in it; what is no tensor is kept as it is."""
    return cast(NestedT, _map(change, structure))


def _map(change: Callable[[Tensor], Any], structure: Any) -> Any:
    if isinstance(structure, Tensor):
        return change(structure)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_map(change, part) for part in structure))
    if isinstance(structure, tuple | list):
        return type(structure)(_map(change, part) for part in structure)
    if isinstance(structure, dict):
        # A shallow copy first keeps the class and its attributes: OrderedDict, defaultdict, model outputs.
        changed = structure.copy() if type(structure) is not dict else {}
        for key, part in structure.items():
            changed[key] = _map(change, part)
        return changed
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        own = {f.name: _map(change, getattr(structure, f.name)) for f in dataclasses.fields(structure) if f.init}
        return dataclasses.replace(structure, **own)
    return structure


def to_device(batch: NestedT, device: torch.device) -> NestedT:
    """Move a batch to `device`, without waiting where its memory is pinned."""
    if not isinstance(batch, Tensor | tuple | list | dict) and isinstance(batch, Movable):
        return cast(NestedT, batch.to(device))
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def tensors_of(structure: object) -> Iterator[Tensor]:
    """Iterate over the tensors in `structure`, in order."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, tuple | list):
        for part in structure:
            yield from tensors_of(part)
    elif isinstance(structure, Mapping):
        for part in structure.values():
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        for field in dataclasses.fields(structure):
            yield from tensors_of(getattr(structure, field.name))


def leading_dimension(batch: object) -> int:
    """Return the size of the first dimension of the first tensor in `batch`.

    Raises:
        DataError: No tensor with a dimension is in it.
    """
    for tensor in tensors_of(batch):
        if tensor.dim():
            return len(tensor)
    raise DataError(
        f"count_items: a batch of type {type(batch).__name__} holds no tensor whose leading dimension could be "
        "counted. Override count_items(self, batch) to say how many items its loss is a mean over."
    )


def unbind(outputs: NestedT, count: int) -> list[NestedT]:
    """Split the outputs of a batch of `count` samples into one for each sample."""
    return [map_tensors(lambda tensor, i=i: tensor[i], outputs) for i in range(count)]  # type: ignore[misc]  # i is an int

"""Tensors in nested structures: tuples, lists, mappings, dataclasses, and objects with their own `.to()`."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import TypeVar

from ptacc.errors import DataError

NestedT = TypeVar("NestedT")


def map_tensors(change: Callable[[Tensor], Any], structure: NestedT) -> NestedT:
    """Rebuild `structure` with `change` applied to each tensor. Other values are kept."""
    return cast(NestedT, _map(change, structure))


def _map(
    change: Callable[[Tensor], Any],
    structure: Any,
    method: str = "",
    call: Callable[[Any], Any] = lambda bound: bound(),
) -> Any:
    """Rebuild a structure. Objects with a method of that name, as graphs have `to`, are rebuilt by a call of it."""
    if isinstance(structure, Tensor):
        return change(structure)
    if method and type(structure) not in (tuple, list, dict) and callable(getattr(type(structure), method, None)):
        return call(getattr(structure, method))
    if isinstance(structure, tuple | list) and not hasattr(structure, "_fields"):
        return type(structure)(_map(change, part, method, call) for part in structure)
    if (opened := open_container(structure)) is None:
        return structure
    parts, rebuild = opened
    return rebuild({key: _map(change, part, method, call) for key, part in parts.items()})


def open_container(structure: Any) -> tuple[Mapping[Any, Any], Callable[[dict[Any, Any]], Any]] | None:
    """Return the parts of a mapping, a tuple or a dataclass, and a function that rebuilds it of other parts.

    None for other objects.
    """
    if isinstance(structure, Mapping):
        return structure, lambda parts: _rebuild_mapping(structure, parts)
    if isinstance(structure, tuple):
        make = type(structure) if hasattr(structure, "_fields") else lambda *parts: parts
        return dict(enumerate(structure)), lambda parts: make(*parts.values())
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        parts = {field.name: getattr(structure, field.name) for field in dataclasses.fields(structure) if field.init}
        return parts, lambda parts: dataclasses.replace(structure, **parts)
    return None


def _rebuild_mapping(mapping: Any, parts: dict[Any, Any]) -> Any:
    """Return a mapping of the same class with other parts; a dictionary if its class cannot be built of one."""
    if type(mapping) is dict:
        return parts
    if isinstance(mapping, dict | UserDict):
        copied = mapping.copy() if isinstance(mapping, dict) else copy.copy(mapping)
        for key, part in parts.items():  # the copy has the attributes, of a defaultdict or of model outputs
            copied[key] = part
        return copied
    try:
        return type(mapping)(parts)
    except TypeError:
        return parts


def to_device(batch: NestedT, device: torch.device, move: Callable[[Tensor], Tensor] | None = None) -> NestedT:
    """Move a batch to `device`, asynchronously from pinned memory.

    Args:
        batch: A structure of tensors, and of objects with their own `to(device)`, which also get `non_blocking=True`
            if they accept it.
        device: The target device.
        move: Moves a tensor, in place of `tensor.to(device, non_blocking=True)`.
    """
    move = move or (lambda tensor: tensor.to(device, non_blocking=True))

    def call(to: Callable[..., Any]) -> Any:
        try:
            return to(device, non_blocking=True)
        except TypeError:  # a `to` with the device alone
            return to(device)

    return cast(NestedT, _map(move, batch, "to", call))


def pin_memory(batch: NestedT) -> NestedT:
    """Copy a batch to pinned memory, by its own `pin_memory()` if it has one."""
    return cast(NestedT, _map(Tensor.pin_memory, batch, "pin_memory"))


def children(structure: object) -> Iterable[tuple[object, Any]]:
    """Return the values of a container, each with its key; nothing for other objects."""
    if isinstance(structure, tuple | list):
        return enumerate(structure)
    if isinstance(structure, Mapping):
        return structure.items()
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        return ((field.name, getattr(structure, field.name, None)) for field in dataclasses.fields(structure))
    return ()


def iterate_tensors(structure: object) -> Iterator[Tensor]:
    """Yield the tensors in `structure`, in order."""
    if isinstance(structure, Tensor):
        yield structure
    else:
        for _, part in children(structure):
            yield from iterate_tensors(part)


def iterate_leaves(structure: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield each value in `structure` that is not a container, and empty containers, with the path of their keys."""
    is_leaf = True
    for key, part in children(structure):
        is_leaf = False
        yield from iterate_leaves(part, f"{path}[{key!r}]")
    if is_leaf:
        yield path, structure


def leading_dimension(batch: object) -> int:
    """Return the size of the first dimension of the first tensor in `batch`; of a `PackedSequence`, its sequences.

    Raises:
        DataError: The batch contains no tensor with a dimension.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Tensor) and first.dim() and not isinstance(batch, PackedSequence):  # fast, for most batches
        return first.shape[0]
    if isinstance(batch, Mapping):
        first = next(iter(batch.values()), None)
    for part in (batch, first):
        if isinstance(part, PackedSequence):
            return int(part.batch_sizes[0])
    for tensor in iterate_tensors(batch):
        if tensor.dim():
            return tensor.shape[0]
    raise DataError(
        f"count_items: a batch of type {type(batch).__name__} holds no tensor whose leading dimension could be "
        "counted. Override count_items(self, batch) to return the number of items that its loss is a mean over."
    )


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, without its graph."""
    return tensor.detach().cpu()


def concatenate(parts: Sequence[NestedT], device: torch.device) -> NestedT:
    """Concatenate the structures of all ranks, tensor by tensor along the first dimension. Scalars are stacked.

    Raises:
        DataError: The structures differ, hold values that are not tensors, or tensors that differ in other dimensions.
    """
    first, *others = [dict(iterate_leaves(part)) for part in parts]
    for rank, other in enumerate(others, start=1):
        if other.keys() != first.keys():
            raise DataError(f"gather(): rank 0 gave values at {list(first)}, and rank {rank} at {list(other)}.")
    columns = ([leaves[path] for leaves in (first, *others)] for path in first)
    joined = iter([concatenate_leaf(column).to(device) for column in columns])
    return map_tensors(lambda _: next(joined), parts[0])


def concatenate_leaf(values: Sequence[object]) -> Tensor:
    """Concatenate one tensor of each rank, in the order of ranks."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) < len(values):
        kind = next(type(value).__name__ for value in values if not isinstance(value, Tensor))
        raise DataError(
            f"gather() takes tensors and structures of them: got a {kind}. Use trainer.distributed.gather(value) "
            "for it."
        )
    if len({(tensor.dtype, tensor.shape[1:], tensor.dim()) for tensor in tensors}) > 1:
        found = ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in tensors)
        raise DataError(f"gather(): tensors may differ in the first dimension only: got {found}. Pad them first.")
    return torch.cat(tensors) if tensors[0].dim() else torch.stack(tensors)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's entries in order. A contiguous tensor on the host is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return memoryview(b"")
    # torch regards a tensor of one entry as contiguous with any stride, and view() does not.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def has_shape(tensor: Tensor) -> bool:
    """Return whether the shape of a tensor is known. That of a lazy parameter is not, before the first batch."""
    return not is_lazy(tensor)

"""DTensors in checkpoints: each rank saves its local shard as a plain tensor, with its position in the full tensor.

```
get_shard(dtensor)         -> Shard: the local tensor, by reference, with the indices that it holds
assemble(shards)           -> Shard: the full tensor, from the shards of all ranks
localize(shard, dtensors)  -> a DTensor with this rank's part of it; a plain tensor if the model is not sharded
```

Only `full_tensor` and `match_placement` communicate.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor
from typing_extensions import override

from ptacc.errors import CheckpointError

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_MAPPINGS = (dict, OrderedDict)
_SEQUENCES = (list, tuple)
IndexRanges: TypeAlias = tuple[tuple[int, int], ...]
"""Indices of one dimension, as (start, stop) of each contiguous range, in the order of the local tensor."""


@dataclass(frozen=True)
class ShardingSpec:
    """How a tensor is sharded over a device mesh, in names that a checkpoint can hold.

    Args:
        placements: For each dimension of the mesh, `"S(0)"` if dimension 0 of the tensor is sharded over it, `"R"` if
            the tensor is replicated.
        mesh: Names of the mesh's dimensions.
    """

    placements: tuple[str, ...]
    mesh: tuple[str, ...]

    @classmethod
    def from_tensor(cls, tensor: DTensor) -> ShardingSpec:
        """Return the spec of a DTensor."""
        dims = [getattr(placement, "dim", None) for placement in tensor.placements]  # strided shards have a dim as well
        placements = tuple("R" if dim is None else f"S({dim})" for dim in dims)
        return cls(placements, tuple(tensor.device_mesh.mesh_dim_names or ()))

    @override
    def __str__(self) -> str:
        """Return a line such as `S(0) over dp_shard`."""
        return f"{' '.join(self.placements)} over {' '.join(self.mesh)}"


@dataclass(frozen=True)
class Shard:
    """One rank's part of a tensor, or the full tensor that `assemble` made of all parts.

    Args:
        local: The values.
        shape: Shape of the full tensor.
        index_ranges: For each dimension, the indices of the full tensor that `local` holds.
        sharding: How the full tensor was sharded.
    """

    local: Tensor
    shape: tuple[int, ...]
    index_ranges: tuple[IndexRanges, ...]
    sharding: ShardingSpec

    @property
    def is_consistent(self) -> bool:
        """Whether the ranges lie within the full tensor, and `local` has their size."""
        if len(self.index_ranges) != len(self.shape):
            return False
        is_inside = all(
            0 <= start < stop <= size
            for ranges, size in zip(self.index_ranges, self.shape, strict=True)
            for start, stop in ranges
        )
        sizes = tuple(sum(stop - start for start, stop in ranges) for ranges in self.index_ranges)
        return is_inside and tuple(self.local.shape) == sizes

    @property
    def is_full(self) -> bool:
        """Whether `local` is the full tensor."""
        return self.index_ranges == full_ranges(self.shape)


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Return whether a value is a DTensor, without importing that class."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor. For a DTensor a collective: one gather for each dimension of the mesh."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    for dim in range(tensor.device_mesh.ndim - 1):
        tensor = tensor.redistribute(placements=[Replicate()] * (dim + 1) + list(tensor.placements[dim + 1 :]))
    return tensor.full_tensor()


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, by reference; any other tensor is returned unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def get_shard(tensor: DTensor) -> Shard:
    """Return this rank's part of a DTensor, by reference."""
    ranges = local_index_ranges(tensor.shape, tensor)
    return Shard(tensor.to_local().detach(), tuple(tensor.shape), ranges, ShardingSpec.from_tensor(tensor))


# ---- the indices that a rank holds


def full_ranges(shape: Sequence[int]) -> tuple[IndexRanges, ...]:
    """Return the index ranges of a full tensor."""
    return tuple(((0, size),) if size else () for size in shape)


def local_index_ranges(shape: Sequence[int], like: DTensor) -> tuple[IndexRanges, ...]:
    """Return the indices that this rank holds of a tensor that is sharded as `like` is, for each dimension."""
    mesh, placements = like.device_mesh, tuple(like.placements)
    return tuple(_local_ranges(len(shape), dim, size, mesh, placements) for dim, size in enumerate(shape))


@functools.lru_cache(maxsize=4096)
def _local_ranges(ndim: int, dim: int, size: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> IndexRanges:
    """Return the indices of one dimension: torch itself shards a tensor of indices, which needs no communication."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    shape = [1] * ndim
    shape[dim] = size
    placements = tuple(p if getattr(p, "dim", None) == dim else Replicate() for p in placements)
    indices = torch.arange(size, device=mesh.device_type).reshape(shape)
    local: list[int] = distribute_tensor(indices, mesh, placements, src_data_rank=None).to_local().flatten().tolist()
    starts = [i for i, index in enumerate(local) if i == 0 or index != local[i - 1] + 1]
    return tuple((local[a], local[b - 1] + 1) for a, b in itertools.pairwise([*starts, len(local)]))


def slice_local(tensor: Tensor, index_ranges: Sequence[IndexRanges]) -> Tensor:
    """Return a contiguous copy of the given indices of a full tensor."""
    part = tensor
    for dim, ranges in enumerate(index_ranges):
        pieces = [part.narrow(dim, start, stop - start) for start, stop in ranges]
        part = torch.cat(pieces, dim) if pieces else part.narrow(dim, 0, 0)
    return part.clone(memory_format=torch.contiguous_format)


# ---- from plain tensors to DTensors


def from_local(like: DTensor, placements: Sequence[Placement], shape: Sequence[int], local: Tensor) -> DTensor:
    """Return the DTensor of a shape whose part on this rank is `local`.

    It is on the mesh of `like`, and where the parts of `like` are: FSDP may keep them on the host.
    """
    from torch.distributed.tensor import DTensor

    mesh, stride = like.device_mesh, torch.empty(tuple(shape), device="meta").stride()
    placed = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return cast("DTensor", placed.to(like.to_local().device))


def distribute_like(like: DTensor, tensor: Tensor) -> DTensor:
    """Shard a full tensor, equal on all ranks, as `like` is sharded. This does not communicate."""
    local = slice_local(tensor, local_index_ranges(tensor.shape, like))
    return from_local(like, like.placements, tensor.shape, local)


def match_placement(parameter: Tensor, value: Any) -> Any:
    """Return `value` with the placement of a parameter: sharded if the parameter is, else full.

    A DTensor is gathered for a plain parameter: a collective. A plain tensor is sharded if it has the parameter's
    shape, else replicated. Scalars, such as an optimizer's step count, and values that are not tensors are unchanged.
    """
    if not isinstance(value, Tensor) or is_dtensor(parameter) == is_dtensor(value):
        return value
    if is_dtensor(value):
        return full_tensor(value).to(parameter.device)
    if not value.dim():
        return value
    assert is_dtensor(parameter)
    if value.shape == parameter.shape:
        return distribute_like(parameter, value)
    from torch.distributed.tensor import Replicate

    return from_local(parameter, [Replicate()] * parameter.device_mesh.ndim, value.shape, value)


def localize(value: Any, dtensors: Mapping[ShardingSpec, DTensor]) -> Any:
    """Return a saved shard as a tensor of the present model. Any other value is returned unchanged.

    Args:
        value: A value of a saved state.
        dtensors: A parameter of the model for each of its shardings; empty if the model is not sharded.

    Raises:
        CheckpointError: The model is sharded in another way, or not at all and the shard is not full.
    """
    if not isinstance(value, Shard):
        return value
    if not dtensors:
        if value.is_full:
            return value.local
        raise CheckpointError(
            f"A tensor of shape {value.shape} was saved in shards, and this run does not shard its model. Resume with "
            "the same engine, or load the weights alone by load_checkpoint(weights_only=True)."
        )
    if value.sharding not in dtensors:
        known = ", ".join(map(str, dtensors))
        raise CheckpointError(f"A tensor was sharded as {value.sharding}, and this run shards as {known}.")
    like = dtensors[value.sharding]
    if value.is_full:
        return distribute_like(like, value.local)
    if value.index_ranges != local_index_ranges(value.shape, like):
        raise CheckpointError(f"A shard of a tensor of shape {value.shape} holds indices of another rank.")
    return from_local(like, like.placements, value.shape, value.local)


# ---- states of all ranks


def assemble(shards: Sequence[Shard]) -> Shard:
    """Return the full tensor of all ranks' shards. Replicated shards may be given more than once.

    Raises:
        CheckpointError: The shards are of different tensors, overlap, or do not cover the full tensor.
    """
    first = shards[0]
    parts = {shard.index_ranges: shard for shard in shards}
    if any(shard.shape != first.shape or shard.local.dtype != first.local.dtype for shard in shards):
        raise CheckpointError(f"The shards of a tensor of shape {first.shape} differ in shape or dtype.")
    if sum(part.local.numel() for part in parts.values()) != math.prod(first.shape):
        raise CheckpointError(f"{len(parts)} shards do not cover a tensor of shape {first.shape}.")
    full = torch.empty(first.shape, dtype=first.local.dtype, device="cpu")
    is_covered = torch.zeros(first.shape, dtype=torch.bool, device="cpu")
    for ranges, part in parts.items():
        for in_full, in_local in _blocks(ranges):
            full[in_full] = part.local[in_local]
            is_covered[in_full] = True
    if not is_covered.all():
        raise CheckpointError(f"{len(parts)} shards of a tensor of shape {first.shape} overlap.")
    return Shard(full, first.shape, full_ranges(first.shape), first.sharding)


def _blocks(index_ranges: Sequence[IndexRanges]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Iterate over the contiguous blocks of a shard: each as slices of the full tensor, and of the local one."""
    sides: list[list[tuple[slice, slice]]] = []
    for ranges in index_ranges:
        ends = itertools.accumulate(stop - start for start, stop in ranges)
        sides.append([(slice(a, b), slice(end - (b - a), end)) for (a, b), end in zip(ranges, ends, strict=True)])
    for block in itertools.product(*sides):
        yield tuple(in_full for in_full, _ in block), tuple(in_local for _, in_local in block)


def map_state(state: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild a state of dictionaries, lists and tuples with `change` applied to each other value."""
    if type(state) in _MAPPINGS:
        return type(state)((key, map_state(part, change)) for key, part in state.items())
    if type(state) in _SEQUENCES:
        return type(state)(map_state(part, change) for part in state)
    return change(state)


def merge_states(states: Sequence[Any]) -> Any:
    """Merge the states of all ranks: shards are assembled, any other value is that of the first rank.

    Raises:
        CheckpointError: The states differ in structure, or their shards cannot be assembled.
    """
    first, kind = states[0], type(states[0])
    if len(set(map(_structure, states))) > 1:
        raise CheckpointError("The states of the ranks differ in structure.")
    if kind is Shard:
        return assemble(states)
    if kind in _MAPPINGS:
        return kind((key, merge_states([state[key] for state in states])) for key in first)
    if kind in _SEQUENCES:
        return kind(merge_states(parts) for parts in zip(*states, strict=True))
    return first


def _structure(state: Any) -> object:
    """Return what has to be equal in the states of all ranks at one place."""
    kind = type(state)
    if kind in _MAPPINGS:
        return kind, frozenset(state)
    return (kind, len(state)) if kind in _SEQUENCES else kind is Shard

"""Shards: what one process holds of a tensor that is dealt over several, as a plain tensor and its place.

```
get_shard(dtensor)    -> Shard: the local tensor by reference, and where it lies in the whole
whole_from(shards)   -> Whole: the tensor put together, by no process in particular
part_of(whole, ...)  -> what a process holds of it, where others than before share it
```

Nothing here communicates, and what is stored of a place is numbers and names.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

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
"""Containers that may hold tensors which are dealt."""
IndexRanges: TypeAlias = tuple[tuple[int, int], ...]
"""Indices of a dimension, as (start, stop) of each stretch, in the order in which a process holds them."""


@dataclass(frozen=True)
class ShardingSpec:
    """How tensors are dealt over a mesh of processes.

    Args:
        placements: For each dimension of the mesh, `"S(0)"` where the first dimension is dealt over it, `"R"` where
            every process has the same.
        mesh: Names of the mesh's dimensions.
    """

    placements: tuple[str, ...]
    mesh: tuple[str, ...]

    @classmethod
    def from_tensor(cls, tensor: DTensor) -> ShardingSpec:
        """Return how `tensor` is dealt."""
        dims = [getattr(placement, "dim", None) for placement in tensor.placements]  # strided shards have one, too
        placements = tuple("R" if dim is None else f"S({dim})" for dim in dims)
        return cls(placements, tuple(tensor.device_mesh.mesh_dim_names or ()))

    @override
    def __str__(self) -> str:
        """Tell it in a line: `S(0) over dp_shard`."""
        return f"{' '.join(self.placements)} over {' '.join(self.mesh)}"


@dataclass(frozen=True)
class Shard:
    """One process's part of a tensor.

    Args:
        local: The part.
        shape: Of the whole.
        runs: The indices that the part holds, for each dimension.
        dealing: How the whole is dealt.
    """

    local: Tensor
    shape: tuple[int, ...]
    index_ranges: tuple[IndexRanges, ...]
    sharding: ShardingSpec

    @property
    def is_consistent(self) -> bool:
        """Whether the part is of the size that its place has, and lies within the whole."""
        if len(self.index_ranges) != len(self.shape):
            return False
        inside = all(
            0 <= start < stop <= size
            for runs, size in zip(self.index_ranges, self.shape, strict=True)
            for start, stop in runs
        )
        return inside and tuple(self.local.shape) == tuple(sum(b - a for a, b in runs) for runs in self.index_ranges)


@dataclass(frozen=True)
class AssembledTensor:
    """A tensor that was put together from shards.

    Args:
        tensor: All of it.
        dealing: How it was dealt.
    """

    tensor: Tensor
    dealing: ShardingSpec


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Say whether a value is a tensor of which this process holds a part alone."""
    return isinstance(value, Tensor) and hasattr(value, "device_mesh")


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor. A collective where it is dealt: one for each dimension of the mesh."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    for dim in range(tensor.device_mesh.ndim - 1):
        tensor = tensor.redistribute(placements=[Replicate()] * (dim + 1) + list(tensor.placements[dim + 1 :]))
    return tensor.full_tensor()


def get_shard(tensor: DTensor) -> Shard:
    """Return this process's part, by reference, and its place."""
    runs = local_index_ranges(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(tensor.to_local().detach(), tuple(tensor.shape), runs, ShardingSpec.from_tensor(tensor))


def local_index_ranges(
    shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement]
) -> tuple[IndexRanges, ...]:
    """Return the indices that this process holds of a tensor, for each dimension."""
    return tuple(_local_ranges(len(shape), dim, size, mesh, tuple(placements)) for dim, size in enumerate(shape))


@functools.lru_cache(maxsize=4096)
def _local_ranges(ndim: int, dim: int, size: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> IndexRanges:
    """Return the indices of one dimension: torch itself is asked to deal them, which it does without a message."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    shape = [1] * ndim
    shape[dim] = size
    dealt = [placement if getattr(placement, "dim", None) == dim else Replicate() for placement in placements]
    indices = torch.arange(size, device=mesh.device_type).reshape(shape)
    held: list[int] = distribute_tensor(indices, mesh, dealt, src_data_rank=None).to_local().flatten().tolist()
    starts = [i for i, index in enumerate(held) if i == 0 or index != held[i - 1] + 1]
    return tuple((held[a], held[b - 1] + 1) for a, b in itertools.pairwise([*starts, len(held)]))


def from_local(mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int], local: Tensor) -> DTensor:
    """Return the tensor of a shape that is dealt over a mesh, of which this process's part is `local`."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    local = local.to(mesh.device_type)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def distribute_like(like: DTensor, whole: Tensor) -> DTensor:
    """Return a tensor that every process has whole as one that is dealt as another is. No process communicates."""
    mesh, placements = like.device_mesh, like.placements
    return from_local(
        mesh, placements, like.shape, slice_local(whole, local_index_ranges(like.shape, mesh, placements))
    )


def match_placement(parameter: Tensor, value: Any) -> Any:
    """Return a value as it belongs beside a parameter: dealt if that is, else whole, for which all processes call it.

    A number, such as that of an optimizer's steps, is as it is.
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

    mesh = parameter.device_mesh
    return from_local(mesh, [Replicate()] * mesh.ndim, value.shape, value)


def assemble(shards: Sequence[Shard]) -> AssembledTensor:
    """Put a tensor together from all processes' parts; one part may come more than once.

    Raises:
        CheckpointError: They are of different tensors, overlap, or leave something out.
    """
    first = shards[0]
    parts = {shard.index_ranges: shard for shard in shards}
    if any(shard.shape != first.shape or shard.local.dtype != first.local.dtype for shard in shards):
        raise CheckpointError(f"Parts of different tensors, the first of shape {first.shape}, do not make one.")
    if sum(part.local.numel() for part in parts.values()) != math.prod(first.shape):
        raise CheckpointError(f"{len(parts)} parts do not make a whole tensor of shape {first.shape}.")
    whole = torch.empty(first.shape, dtype=first.local.dtype)
    is_there = torch.zeros(first.shape, dtype=torch.bool)
    for runs, part in parts.items():
        for there, here in _blocks(runs):
            whole[there] = part.local[here]
            is_there[there] = True
    if not is_there.all():
        raise CheckpointError(f"{len(parts)} parts of a tensor of shape {first.shape} overlap.")
    return AssembledTensor(whole, first.sharding)


def slice_local(whole: Tensor, runs: tuple[IndexRanges, ...]) -> Tensor:
    """Return what a process holds of a whole tensor: a copy."""
    part = whole
    for dim, stretches in enumerate(runs):
        pieces = [part.narrow(dim, start, stop - start) for start, stop in stretches]
        part = torch.cat(pieces, dim) if pieces else part.narrow(dim, 0, 0)
    return part.clone(memory_format=torch.contiguous_format)


def _blocks(runs: tuple[IndexRanges, ...]) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Iterate over the blocks of a part: where each lies in the whole, and where in the part."""
    sides: list[list[tuple[slice, slice]]] = []
    for stretches in runs:
        ends = itertools.accumulate(stop - start for start, stop in stretches)
        sides.append([(slice(a, b), slice(end - (b - a), end)) for (a, b), end in zip(stretches, ends, strict=True)])
    for block in itertools.product(*sides):
        yield tuple(there for there, _ in block), tuple(here for _, here in block)


def map_state(state: Any, change: Callable[[Any], Any]) -> Any:
    """Return a state with each value that is no container of tensors changed."""
    if type(state) in _MAPPINGS:
        return type(state)((key, map_state(part, change)) for key, part in state.items())
    if type(state) in _SEQUENCES:
        return type(state)(map_state(part, change) for part in state)
    return change(state)


def merge_states(states: Sequence[Any]) -> Any:
    """Return what all processes' states are together: their shards whole, and of all else the first's.

    Raises:
        CheckpointError: They are not alike, or their shards make no whole.
    """
    first = states[0]
    if isinstance(first, Shard):
        if not all(isinstance(state, Shard) for state in states):
            raise CheckpointError("What is a part of a tensor for one process is none for another.")
        return assemble(states)
    if type(first) in _MAPPINGS:
        if any(type(state) is not type(first) or state.keys() != first.keys() for state in states):
            raise CheckpointError("The states of the processes have different names.")
        return type(first)((key, merge_states([state[key] for state in states])) for key in first)
    if type(first) in _SEQUENCES:
        if any(type(state) is not type(first) or len(state) != len(first) for state in states):
            raise CheckpointError("The states of the processes have different lengths.")
        return type(first)(merge_states(parts) for parts in zip(*states, strict=True))
    return first


def unwrap(value: Any) -> Any:
    """Return a tensor that was put together as a plain one.

    Raises:
        CheckpointError: It is a part alone.
    """
    if isinstance(value, Shard):
        raise CheckpointError(
            f"A tensor of shape {value.shape} was saved in parts, by an engine that shards, and this one does not. Go "
            "on with that engine, or load the weights alone by load_checkpoint(weights_only=True)."
        )
    return value.tensor if isinstance(value, AssembledTensor) else value

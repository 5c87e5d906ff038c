"""FSDP2 by torch itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ptacc.tensors.structures import map_tensors


@dataclass(frozen=True)
class Units:
    """What is put together by itself, and how.

    Args:
        modules: Submodules, inner ones and outer ones in any order.
        reshards: Whether they are let go between the forward and the backward pass.
        param_dtype: What they compute in, their own if None.
        reduce_dtype: What gradients are averaged in, that of the computation if None.
        offloads: Whether shards stay in the host's memory.
    """

    modules: Sequence[nn.Module]
    reshards: bool = True
    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    offloads: bool = False


def shard_units(model: nn.Module, mesh: DeviceMesh, units: Units) -> None:
    """Deal the tensors of a model out over a mesh of one dimension, unit by unit. A collective."""
    precision = MixedPrecisionPolicy(param_dtype=units.param_dtype, reduce_dtype=units.reduce_dtype)
    offload = CPUOffloadPolicy() if units.offloads else OffloadPolicy()
    chosen = {id(module) for module in units.modules}
    inner = [module for module in model.modules() if module is not model and id(module) in chosen]
    for module in (*reversed(inner), model):  # from the inside out
        module.register_forward_hook(without_views)
        fully_shard(
            module, mesh=mesh, reshard_after_forward=units.reshards, mp_policy=precision, offload_policy=offload
        )


def without_views(_: nn.Module, __: object, outputs: Any) -> Any:
    """Copy what a unit puts out as a view: torch's hook on that is lost once somebody changes it in place."""
    if not torch.is_grad_enabled():
        return outputs
    return map_tensors(lambda tensor: tensor.clone() if is_view(tensor) else tensor, outputs)


def is_view(tensor: Tensor) -> bool:
    """Say whether a tensor with a gradient is a view of another."""
    return tensor.requires_grad and tensor._base is not None  # noqa: SLF001  # there is no public way to ask

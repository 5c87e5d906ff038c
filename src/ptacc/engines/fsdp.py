"""FSDP2: shards a model by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ptacc.errors import LaunchError
from ptacc.tensors.structures import map_tensors


def check_offload(owner: str) -> None:
    """Raise `LaunchError` if the process group cannot communicate on the host, where offloaded shards are."""
    group = dist.distributed_c10d._get_default_group()  # noqa: SLF001  # torch has no public name for its devices
    devices = {device.type for device in group._device_types}  # noqa: SLF001
    if "cpu" not in devices:
        raise LaunchError(
            f"{owner}(fsdp_cpu_offload=True): shards are gathered on the host, and the process group communicates on "
            f"{', '.join(sorted(devices))} only. Write in configure_accelerator of a mixin of your own, and initialize "
            "no process group before: builder.write(MyMixin, kwargs_handlers=["
            'InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")]).'
        )


def find_units(model: nn.Module) -> list[nn.Module]:
    """Return the units that a transformers model names, or the blocks in each `nn.ModuleList` of another model."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    if names:
        return [module for module in model.modules() if type(module).__name__ in names]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if not isinstance(block, nn.ModuleList | nn.ModuleDict)]


def shard_units(
    model: nn.Module,
    mesh: DeviceMesh,
    units: Sequence[nn.Module],
    *,
    reshard_after_forward: bool,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    cpu_offload: bool,
) -> None:
    """Shard a model over the last dimension of a mesh, unit by unit. A collective.

    Args:
        model: The model; what lies in no unit of `units` is a unit with it.
        mesh: A mesh of one dimension, or of two: there are replicas of the shards over the first one.
        units: Submodules whose parameters are gathered together, in any order.
        reshard_after_forward: Whether a unit's parameters are freed between its forward and its backward pass.
        param_dtype: Dtype in which units are gathered and computed; None for that of the parameters.
        reduce_dtype: Dtype in which gradients are averaged; None for that of the computation.
        cpu_offload: Whether shards stay in host memory.
    """
    precision = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    chosen = {id(module) for module in units}
    inner = [module for module in model.modules() if module is not model and id(module) in chosen]
    for module in (*reversed(inner), model):  # from the inside out
        module.register_forward_hook(clone_views)
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=precision,
            offload_policy=offload,
        )


def clone_views(_: nn.Module, __: object, outputs: Any) -> Any:
    """Clone outputs of a unit that are views: FSDP2's backward hook on a view is lost if it is modified in place."""

    def clone(tensor: Tensor) -> Tensor:
        is_view = tensor._base is not None  # noqa: SLF001  # torch has no public property for it
        return tensor.clone() if is_view and tensor.requires_grad else tensor

    return map_tensors(clone, outputs) if torch.is_grad_enabled() else outputs

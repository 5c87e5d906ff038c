"""FSDP2 by torch itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ptacc.core.engine import Slot
from ptacc.engines.sharded import ShardedEngine
from ptacc.protocols import DeviceRuntime

MESH = "dp_shard"
"""The name of the mesh's dimension over which tensors are dealt."""


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


class FSDPEngine(ShardedEngine):
    """A model whose units are dealt over all processes."""

    def __init__(
        self,
        accelerator: DeviceRuntime,
        model: nn.Module,
        slots: Sequence[Slot],
        units: Units,
        *,
        gives_back: bool = True,
    ) -> None:
        """Shard a model by its units. A collective."""
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,), mesh_dim_names=(MESH,))
        precision = MixedPrecisionPolicy(param_dtype=units.param_dtype, reduce_dtype=units.reduce_dtype)
        offload = CPUOffloadPolicy() if units.offloads else OffloadPolicy()

        def shard(model: nn.Module) -> None:
            chosen = {id(module) for module in units.modules}
            inner = [module for module in model.modules() if module is not model and id(module) in chosen]
            for module in (*reversed(inner), model):  # from the inside out
                fully_shard(
                    module,
                    mesh=mesh,
                    reshard_after_forward=units.reshards,
                    mp_policy=precision,
                    offload_policy=offload,
                )

        super().__init__(accelerator, model, slots, shard, gives_back=gives_back)

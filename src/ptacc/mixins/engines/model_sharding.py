"""The base of the mixins that shard a model over ranks: one device mesh, and one engine on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import nn
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.hooks import Mixin
from ptacc.distributed.fsdp_launch import check_replicas
from ptacc.engines.base import Engine
from ptacc.profiling.memory_estimate import ShardCounts

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh

ShardFn: TypeAlias = Callable[[nn.Module, "DeviceMesh"], None]
"""Shards a model in place, over the last dimension of the mesh."""
TENSOR, DATA, REPLICAS = "tp", "dp_shard", "dp_replicate"
"""The mesh dimensions, with Accelerate's names, in the order in which a model is sharded over them.

Ranks along the first share a replica of the model and get the same batches; the replicas are sharded along the second.
Along the third, there are replicas of the shards.
"""
ENGINE_NAMES = {DATA: "fsdp", TENSOR: "tensor parallel"}
"""The name of an engine in checkpoints, by the dimension that it shards over."""


class ShardingMixin(Mixin):
    """Trains a sharded model; the base of `FSDPMixin` and `TensorParallelMixin`.

    A single process trains as without this mixin.
    """

    @hook("fold")
    def shard_functions(self) -> Mapping[str, ShardFn]:
        """Return the functions that shard the model, by mesh dimension. A fold: extend the result of `super()`."""
        return {}

    @hook("default")
    def sharded_replicas(self) -> int:
        """Return the number of replicas of the shards. A default hook: 1."""
        return 1

    @hook("default")
    def should_unshard_after_run(self) -> bool:
        """Return whether every rank has the full model after the run. A default hook: True."""
        return True

    @override
    def make_engine(self) -> Engine:
        """Shard the model and the optimizer's state. A collective.

        Raises:
            LaunchError: There are several replicas, and no mixin that shards them, or not in equal parts.
        """
        if self._distributed.is_single_process:
            return super().make_engine()
        from ptacc.engines.sharded import ShardedEngine, make_mesh  # importing it takes longer than all of ptacc

        shard_functions, replicas = self.shard_functions(), self.sharded_replicas()
        check_replicas(type(self).__name__, self._distributed, replicas, can_shard=DATA in shard_functions)
        sizes = {
            REPLICAS: replicas,
            DATA: self.distributed.replicas // replicas,
            TENSOR: self._distributed.replica_size,
        }
        dims = {TENSOR: (TENSOR,), DATA: (REPLICAS, DATA) if replicas > 1 else (DATA,)}
        used = [dim for name in shard_functions for dim in dims[name]]
        mesh = make_mesh(self.device, {name: size for name, size in sizes.items() if name in used})

        def shard(model: nn.Module) -> None:
            for name in (TENSOR, DATA):
                if name in shard_functions:
                    shard_functions[name](model, mesh[dims[name]])

        return ShardedEngine(
            self.accelerator,
            self.unwrapped_model,
            self.optimizer_slots(),
            shard,
            unshard_after_run=self.should_unshard_after_run(),
        )

    @override
    def resume_invariants(self) -> dict[str, str]:
        engine = " and ".join(ENGINE_NAMES[name] for name in sorted(self.shard_functions()))
        replicas = f" with {self.sharded_replicas()} replicas" if self.sharded_replicas() > 1 else ""
        return super().resume_invariants() | {"engine": engine + replicas}

    @override
    def _shard_counts(self) -> ShardCounts:
        count = self.distributed.replicas // self.sharded_replicas() if DATA in self.shard_functions() else 1
        return ShardCounts(count, count, count, self._distributed.replica_size)

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        with super().around_run():
            yield
        if self.should_unshard_after_run():  # the averages are unsharded with the model
            for averages in self.run.averages().values():
                averages.unshard()

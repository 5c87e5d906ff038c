"""The base of the mixins that shard a model over ranks: one device mesh, and one engine on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import nn
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.hooks import Mixin
from ptacc.engines.base import Engine
from ptacc.errors import LaunchError

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh

ShardFn: TypeAlias = Callable[[nn.Module, "DeviceMesh"], None]
"""Shards a model over one dimension of the mesh, in place."""
TENSOR, DATA = "tp", "dp_shard"
"""The mesh dimensions, with Accelerate's names, in the order in which a model is sharded over them.

Ranks along the first share a replica of the model and get the same batches; the replicas are sharded along the second.
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
    def should_unshard_after_run(self) -> bool:
        """Return whether every rank has the full model after the run. A default hook: True."""
        return True

    @override
    def make_engine(self) -> Engine:
        """Shard the model and the optimizer's state. A collective.

        Raises:
            LaunchError: There are several replicas, and no mixin that shards them.
        """
        if self._distributed.is_single_process:
            return super().make_engine()
        from ptacc.engines.sharded import ShardedEngine, make_mesh  # importing it takes longer than all of ptacc

        shard_functions, replicas = self.shard_functions(), self.distributed.replicas
        if replicas > 1 and DATA not in shard_functions:
            raise LaunchError(
                f"{type(self).__name__}: {self._distributed.replica_size} processes share a replica of the model, and "
                f"{self.distributed.world_size} were launched: {replicas} replicas, and no mixin shards those. "
                "Compose FSDPMixin as well, or launch fewer processes."
            )
        sizes = {DATA: replicas, TENSOR: self._distributed.replica_size}
        mesh = make_mesh(self.device, {name: size for name, size in sizes.items() if name in shard_functions})

        def shard(model: nn.Module) -> None:
            for name in (TENSOR, DATA):
                if name in shard_functions:
                    shard_functions[name](model, mesh[name])

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
        return super().resume_invariants() | {"engine": engine}

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        with super().around_run():
            yield
        if self.should_unshard_after_run():  # the averages are unsharded with the model
            for averages in self.run.averages().values():
                averages.unshard()

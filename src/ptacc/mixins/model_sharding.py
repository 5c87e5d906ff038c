"""What the mixins that deal a model out over processes have in common: one mesh of them, and one engine on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from torch import nn
from typing_extensions import override

from ptacc.composition.composable import hook
from ptacc.core.hooks import Mixin
from ptacc.engines.base import Engine
from ptacc.errors import LaunchError
from ptacc.model.averaging import AveragedWeights

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh

ShardFn: TypeAlias = Callable[[nn.Module, "DeviceMesh"], None]
"""Deals a model out over one dimension of the mesh, in place."""
TENSOR, DATA = "tp", "dp_shard"
"""The mesh's dimensions, named as Accelerate names them, in the order in which a model is dealt out over them.

Processes along the first share a replica of the model and take the same batches; those along the second have replicas
of their own, dealt out.
"""
WAYS = {DATA: "fsdp", TENSOR: "tensor parallel"}
"""What checkpoints call an engine that deals out over a dimension."""


class ShardingMixin(Mixin):
    """Runs a model that is dealt out over the processes. Those who derive from it say how.

    A single process has nothing to share, and trains as without this mixin.
    """

    @hook("fold")
    def shard_functions(self) -> Mapping[str, ShardFn]:
        """Return what deals a model out, by the mesh's dimension, that of `super()` included."""
        return {}

    @hook("default")
    def should_unshard_after_run(self) -> bool:
        """Return whether the model is whole after a run, on every process."""
        return True

    @override
    def make_engine(self) -> Engine:
        """Deal out the model and what the optimizer holds. A collective.

        Raises:
            LaunchError: There are replicas, and nothing that deals them out.
        """
        if self._distributed.is_single_process:
            return super().make_engine()
        from ptacc.engines.sharded import ShardedEngine, make_mesh  # importing it takes longer than all of ptacc

        shard_functions, replicas = self.shard_functions(), self.distributed.replicas
        if replicas > 1 and DATA not in shard_functions:
            raise LaunchError(
                f"{type(self).__name__}: {self._distributed.replica_size} processes share a replica of the model, and "
                f"{self.distributed.world_size} were launched: {replicas} replicas, and no mixin shards those. "
                "Compose FSDPMixin, too, or launch fewer processes."
            )
        sizes = {DATA: replicas, TENSOR: self._distributed.replica_size}
        mesh = make_mesh(self.device, {name: size for name, size in sizes.items() if name in shard_functions})

        def deal(model: nn.Module) -> None:
            for name in (TENSOR, DATA):
                if name in shard_functions:
                    shard_functions[name](model, mesh[name])

        return ShardedEngine(
            self.accelerator,
            self.unwrapped_model,
            self.optimizer_slots(),
            deal,
            unshard_after_run=self.should_unshard_after_run(),
        )

    @override
    def resume_invariants(self) -> dict[str, str]:
        """Go on under the same engine, by however many processes."""
        return super().resume_invariants() | {
            "engine": " and ".join(WAYS[name] for name in sorted(self.shard_functions()))
        }

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Have what was averaged in shards whole, as the model is."""
        with super().around_run():
            yield
        if self.should_unshard_after_run():
            for _, state in self.run.states():
                if isinstance(state, AveragedWeights):
                    state.unshard()

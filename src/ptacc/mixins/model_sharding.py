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

Dealer: TypeAlias = Callable[[nn.Module, "DeviceMesh"], None]
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
    def dealers(self) -> Mapping[str, Dealer]:
        """Return what deals a model out, by the mesh's dimension, that of `super()` included."""
        return {}

    @hook("default")
    def gives_model_back(self) -> bool:
        """Return whether the model is whole after a run, on every process."""
        return True

    @override
    def make_engine(self) -> Engine:
        """Deal out the model and what the optimizer holds. A collective.

        Raises:
            LaunchError: There are replicas, and nothing that deals them out.
        """
        if self.peers.is_alone:
            return super().make_engine()
        from ptacc.engines.sharded import ShardedEngine, mesh_of  # importing it takes longer than all of ptacc

        dealers, replicas = self.dealers(), self.peers.replicas
        if replicas > 1 and DATA not in dealers:
            raise LaunchError(
                f"{type(self).__name__}: {self.peers.replica_size} processes share a replica of the model, and "
                f"{self.peers.world_size} were launched, which are {replicas} replicas, and nothing deals those out. "
                "Compose FSDPMixin, too, or launch fewer processes."
            )
        sizes = {DATA: replicas, TENSOR: self.peers.replica_size}
        mesh = mesh_of(self.device, {name: size for name, size in sizes.items() if name in dealers})

        def deal(model: nn.Module) -> None:
            for name in (TENSOR, DATA):
                if name in dealers:
                    dealers[name](model, mesh[name])

        return ShardedEngine(
            self.accelerator, self.unwrapped_model, self.slots(), deal, gives_back=self.gives_model_back()
        )

    @override
    def conditions(self) -> dict[str, str]:
        """Go on under the same engine, by however many processes."""
        return super().conditions() | {"engine": " and ".join(WAYS[name] for name in sorted(self.dealers()))}

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Have what was averaged in shards whole, as the model is."""
        with super().around_run():
            yield
        if self.gives_model_back():
            for _, state in self.run.states():
                if isinstance(state, AveragedWeights):
                    state.make_whole()

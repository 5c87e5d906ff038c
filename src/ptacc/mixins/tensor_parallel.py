"""Tensor parallelism."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from typing_extensions import override

from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.engines.base import Engine
from ptacc.engines.tensor_parallel import SPLITS, Layers, SplitName, resolve_layers, split_layers
from ptacc.errors import LaunchError, ModelError, OptionError
from ptacc.mixins.model_sharding import TENSOR, ShardFn, ShardingMixin
from ptacc.rng import DeviceStream, RandomStreams
from ptacc.types.protocols import ParallelStyleLike
from ptacc.validation import check_at_least, value_text

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh

UNKNOWN = ("DP_REPLICATE", "CP", "SP")
"""Sizes of a launch's parallelism that no mixin provides."""


class TensorParallelMixin(ShardingMixin):
    """Splits the matrices of single layers over processes, which compute each batch together.

    For models whose layers are too large, or too slow, for one device; processes that share a replica should be near
    each other, since they exchange activations in each layer. Numbers are those of one process but for rounding.

    With more processes than share a replica, replicas are dealt out by `FSDPMixin`, which is composed beside this. The
    user's model is split in place for a run, and whole again after it. A single process trains as without this mixin.

    Options:
        tensor_parallel_size: Processes that share a replica of the model; None for as many as launched with
            `parallelism_config_tp_size`, or else all.
        tensor_parallel_plan: Which layers are split, and how: names as in `named_modules()`, in which `*` stands for
            anything, each with `"colwise"`, `"rowwise"`, `"colwise_gather_output"`, `"embedding_rowwise"` or a
            `ParallelStyle` of torch. None for the plan that a model of transformers brings, `{}` to split nothing.

    Hooks: `configure_accelerator`, `shard_functions`, `make_engine`, `around_run`.

    Combines with: `FSDPMixin`, and everything that it combines with.

    Source: Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053

    Example:
        >>> from ptacc import FSDPMixin, TensorParallelMixin, Trainer
        >>> class MyTrainer(TensorParallelMixin, FSDPMixin, Trainer):
        ...     tensor_parallel_size: int | None = 2
    """

    tensor_parallel_size: int | None = None
    tensor_parallel_plan: Mapping[str, SplitName | ParallelStyleLike] | None = None

    @classmethod
    @override
    def law_options(cls) -> Mapping[str, Any]:
        """Return a plan that leaves all layers whole: models of the laws have none."""
        return {"tensor_parallel_plan": {}}

    @override
    def check_options(self) -> None:
        """Refuse a size below 1, and what is no plan."""
        owner = type(self).__name__
        if self.tensor_parallel_size is not None:
            check_at_least(owner, "tensor_parallel_size", self.tensor_parallel_size, 1)
        plan: object = self.tensor_parallel_plan
        if plan is not None and not isinstance(plan, Mapping):
            raise OptionError(
                f"{owner}(tensor_parallel_plan={value_text(plan)}): must be a mapping from names of submodules to ways "
                'to split, such as {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}.'
            )
        for name, split in (self.tensor_parallel_plan or {}).items():
            if isinstance(split, str) and split not in SPLITS:
                raise OptionError(
                    f"{owner}(tensor_parallel_plan={{{name!r}: {split!r}}}): must be one of "
                    f"{', '.join(sorted(SPLITS))}, or a ParallelStyle of torch."
                )

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Have processes share replicas, and do without Accelerate what the launch asks of parallelism."""
        super().configure_accelerator(builder)
        builder.provide("parallelism", hide=True)
        builder.replica_size = self._size()

    def _size(self) -> int | None:
        """Return the processes of a replica, None for all."""
        sizes = launched_sizes()
        if unknown := [name for name in UNKNOWN if sizes.get(name, 1) > 1]:
            raise LaunchError(
                f"The launch sets PARALLELISM_CONFIG_{unknown[0]}_SIZE={sizes[unknown[0]]}, and {type(self).__name__} "
                "has nothing that would do it. Launch with tp_size and dp_shard_size alone."
            )
        asked, launched = self.tensor_parallel_size, sizes.get("TP")
        if None not in (asked, launched) and asked != launched:
            raise LaunchError(
                f"The launch asks for a tensor parallel size of {launched}, and {type(self).__name__} was given "
                f"tensor_parallel_size={asked}. Leave one of them out."
            )
        return asked or launched

    @override
    def make_engine(self) -> Engine:
        """Look at the plan and at the launch first, also where there is one process."""
        self._layers()
        shards = launched_sizes().get("DP_SHARD", 1)
        if shards not in (1, self.distributed.replicas):
            raise LaunchError(
                f"The launch asks for a dp_shard_size of {shards}, but {self.distributed.world_size} processes with "
                f"{self._distributed.replica_size} per replica give {self.distributed.replicas}. "
                "Leave it out, or correct it."
            )
        return super().make_engine()

    @override
    def shard_functions(self) -> Mapping[str, ShardFn]:
        """Split layers over the processes of a replica."""
        return {**super().shard_functions(), TENSOR: self._split_layers}

    def _split_layers(self, _: nn.Module, mesh: DeviceMesh) -> None:
        split_layers(mesh, self._layers())

    def _layers(self) -> Layers:
        """Return the layers to split."""
        model, owner = self.unwrapped_model, type(self).__name__
        given = self.tensor_parallel_plan
        plan: Any = getattr(model, "tp_plan", {}) if given is None else given
        if given is None and not plan:
            raise ModelError(
                f"{type(model).__name__} brings no plan of its own, and {owner} was given none: say which layers are "
                'split, tensor_parallel_plan={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}.'
            )
        if strange := {split for split in plan.values() if isinstance(split, str)} - SPLITS:
            raise ModelError(
                f"{type(model).__name__} brings a plan with {min(strange)!r}, which {owner} does not know. Give it a "
                f"tensor_parallel_plan of {', '.join(sorted(SPLITS))}."
            )
        return resolve_layers(model, plan, self._distributed.replica_size, f"{owner}(tensor_parallel_plan=...)")

    @override
    @contextlib.contextmanager
    def around_run(self) -> Iterator[None]:
        """Have the processes of a replica draw alike, as its first does."""
        distributed = self._distributed
        if distributed.replica_size > 1:
            for stream in (RandomStreams(), DeviceStream(self.device)):
                stream.load_state_dict(distributed.gather(stream.state_dict())[distributed.leader])
        with super().around_run():
            yield


def launched_sizes() -> dict[str, int]:
    """Return the sizes of the parallelism that `accelerate launch` was asked for, by their names."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() not in {"1", "true"}:
        return {}
    names = ("TP", "DP_SHARD", *UNKNOWN)
    return {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) for name in names}

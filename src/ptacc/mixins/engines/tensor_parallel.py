"""Tensor parallelism."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping
from typing import Any

from typing_extensions import override

from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.engines.base import Engine
from ptacc.engines.tensor_parallel import SPLITS, Layers, SplitName, resolve_layers, split_layers
from ptacc.errors import LaunchError, ModelError, OptionError
from ptacc.mixins.engines.model_sharding import TENSOR, ShardFn, ShardingMixin
from ptacc.rng import RandomStreams
from ptacc.types.protocols import ParallelStyleLike
from ptacc.validation import check_at_least, value_text

UNSUPPORTED = ("DP_REPLICATE", "CP", "SP")
"""Kinds of parallelism that a launch may set, and no mixin provides."""


class TensorParallelMixin(ShardingMixin):
    """Splits the weight matrices of layers over the ranks of a replica, which compute each batch together.

    This is for models whose layers are too large, or too slow, for one device. The ranks of a replica exchange
    activations in each layer and need a fast interconnect. Results equal those of one process up to rounding. With
    several replicas, compose `FSDPMixin` as well: it shards them. The model is sharded in place for the run, and
    unsharded after it. A single process trains as without this mixin.

    Options:
        tensor_parallel_size: Ranks per replica of the model; None for the launch's `parallelism_config_tp_size`, or for
            all ranks if it has none.
        tensor_parallel_plan: How to split layers: a mapping from names as in `named_modules()`, with `*` as a wildcard,
            to `"colwise"`, `"rowwise"`, `"colwise_gather_output"`, `"embedding_rowwise"` or a `ParallelStyle` of torch.
            None for the plan of a transformers model, `{}` to split no layer.

    Hooks: `configure_accelerator`, `shard_functions`, `make_engine`, `around_run`.

    Combines with: everything that `FSDPMixin` combines with, and `FSDPMixin` itself.

    Source: Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053

    Example:
        >>> from ptacc import FSDPMixin, TensorParallelMixin, Trainer
        >>> class MyTrainer(TensorParallelMixin, FSDPMixin, Trainer):
        ...     tensor_parallel_size: int | None = 2
    """

    tensor_parallel_size: int | None = None
    tensor_parallel_plan: Mapping[str, SplitName | ParallelStyleLike] | None = None

    @override
    def check_options(self) -> None:
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
        super().configure_accelerator(builder)
        builder.provide("parallelism", hide=True)
        builder.replica_size = self._size()

    def _size(self) -> int | None:
        """Return the number of ranks per replica, None for all."""
        sizes = launched_sizes()
        if unknown := [name for name in UNSUPPORTED if sizes.get(name, 1) > 1]:
            raise LaunchError(
                f"The launch sets PARALLELISM_CONFIG_{unknown[0]}_SIZE={sizes[unknown[0]]}, and {type(self).__name__} "
                "does not support it. Launch with tp_size and dp_shard_size alone."
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
        self._layers()  # raises for an invalid plan, even with a single process
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
        return {**super().shard_functions(), TENSOR: lambda _, mesh: split_layers(mesh, self._layers())}

    def _layers(self) -> Layers:
        """Return the layers to split."""
        model, owner = self.unwrapped_model, type(self).__name__
        option = self.tensor_parallel_plan
        plan: Any = getattr(model, "tp_plan", {}) if option is None else option
        if option is None and not plan:
            raise ModelError(
                f"{type(model).__name__} has no plan of its own, and {owner} was given none. Name the layers to split: "
                'tensor_parallel_plan={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}.'
            )
        if unknown := {split for split in plan.values() if isinstance(split, str)} - SPLITS:
            raise ModelError(
                f"{type(model).__name__} has a plan with {min(unknown)!r}, which {owner} does not support. Give it "
                f"a tensor_parallel_plan of {', '.join(sorted(SPLITS))}."
            )
        return resolve_layers(model, plan, self._distributed.replica_size, f"{owner}(tensor_parallel_plan=...)")

    @override
    @contextlib.contextmanager
    def around_run(self) -> Generator[None]:
        """Give the ranks of a replica the random states of its first rank."""
        distributed = self._distributed
        if distributed.replica_size > 1:
            streams = RandomStreams(self.device)
            streams.load_state_dict(distributed.gather(streams.state_dict())[distributed.leader])
        with super().around_run():
            yield


def launched_sizes() -> dict[str, int]:
    """Return the sizes in the parallelism config of `accelerate launch`, by name."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() not in {"1", "true"}:
        return {}
    names = ("TP", "DP_SHARD", *UNSUPPORTED)
    return {name: int(os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) for name in names}

"""Fully sharded data parallelism."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from typing_extensions import override

from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.distributed.fsdp_launch import CHECKED_OPTIONS, check_launch
from ptacc.errors import OptionError
from ptacc.mixins.engines.model_sharding import DATA, ShardFn, ShardingMixin
from ptacc.model.selection import check_selectors, select_submodules
from ptacc.validation import check_at_least

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh


class FSDPMixin(ShardingMixin):
    """Shards parameters, gradients and optimizer state over the ranks: FSDP2, torch's `fully_shard`.

    Each rank holds a shard of every tensor. The parameters of a unit are all-gathered before its forward and freed
    after it, so a model may be larger than the memory of a device. Results equal those of replicas up to rounding. The
    model is sharded in place for the run, and unsharded after it. A single process trains as without this mixin.

    Options:
        fsdp_wrap: The units: classes of submodules, or names as in `named_modules()` with `*` as a wildcard. None for
            the `_no_split_modules` of a transformers model, or the blocks in each `nn.ModuleList` of another model;
            `[]` for a single unit, the model.
        fsdp_replicas: Number of replicas of the sharded model (HSDP). Each is sharded over ranks with consecutive
            numbers, such as those of a host. It must divide the number of ranks. Not with `TensorParallelMixin`.
        fsdp_reshard_after_forward: Whether a unit's parameters are freed between forward and backward: less memory, one
            more all-gather.
        fsdp_param_dtype: The dtype of all-gathered parameters and of the computation; None for that of the parameters.
            With `AMPMixin` in bf16, set `torch.bfloat16`: else each rank keeps the bf16 copies that autocast makes of
            all parameters until the backward pass.
        fsdp_reduce_dtype: The dtype in which gradients are reduced; None for that of the computation.
        fsdp_cpu_offload: Whether shards are kept in host memory, where the optimizer also steps. It needs a GPU, and a
            process group that communicates on the host as well: `InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")`.
        fsdp_unshard_after_run: Whether every rank has the full model after the run. False leaves it sharded, for models
            that do not fit on a device: evaluations, exports and further runs use the sharded model.

    Hooks: `configure_accelerator`, `shard_functions`, `sharded_replicas`, `should_unshard_after_run`, `make_engine`,
    `around_run`, `resume_invariants`.

    Combines with: everything except another engine. Use `AMPMixin` for mixed precision, and `GradCheckpointMixin` for
    activation checkpointing.

    Source: Zhao et al., 2023, https://arxiv.org/abs/2304.11277

    Example:
        >>> from ptacc import AMPMixin, FSDPMixin, GradClipMixin, Trainer
        >>> class MyTrainer(AMPMixin, GradClipMixin, FSDPMixin, Trainer):
        ...     max_grad_norm: float | None = 1.0
    """

    fsdp_wrap: Sequence[type[nn.Module] | str] | None = None
    fsdp_replicas: int = 1
    fsdp_reshard_after_forward: bool = True
    fsdp_param_dtype: torch.dtype | None = None
    fsdp_reduce_dtype: torch.dtype | None = None
    fsdp_cpu_offload: bool = False
    fsdp_unshard_after_run: bool = True

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        if self.fsdp_wrap is not None:
            check_selectors(owner, "fsdp_wrap", self.fsdp_wrap)
        check_at_least(owner, "fsdp_replicas", self.fsdp_replicas, 1)
        for name in ("fsdp_param_dtype", "fsdp_reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise OptionError(f"{owner}({name}={dtype!r}): must be a floating dtype, such as torch.bfloat16.")

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Handle the launch's FSDP settings here: Accelerate would apply them to its process-wide state."""
        super().configure_accelerator(builder)
        builder.provide("fsdp", hide=True)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true"}:
            check_launch(type(self).__name__, {name: getattr(self, name, ()) for name in CHECKED_OPTIONS})

    @override
    def shard_functions(self) -> Mapping[str, ShardFn]:
        return {**super().shard_functions(), DATA: self._shard_units}

    @override
    def sharded_replicas(self) -> int:
        return self.fsdp_replicas

    @override
    def should_unshard_after_run(self) -> bool:
        return (self.fsdp_unshard_after_run or self.is_isolated) and super().should_unshard_after_run()

    def _shard_units(self, model: nn.Module, mesh: DeviceMesh) -> None:
        if self.fsdp_cpu_offload and self.device.type == "cpu":
            raise OptionError(
                f"{type(self).__name__}(fsdp_cpu_offload=True) on a CPU: the shards are in host memory already."
            )
        from ptacc.engines.fsdp import check_offload, shard_units  # importing it takes longer than all of ptacc

        if self.fsdp_cpu_offload:
            check_offload(type(self).__name__)
        shard_units(
            model,
            mesh,
            self._units(),
            reshard_after_forward=self.fsdp_reshard_after_forward,
            param_dtype=self.fsdp_param_dtype,
            reduce_dtype=self.fsdp_reduce_dtype,
            cpu_offload=self.fsdp_cpu_offload,
        )

    def _units(self) -> list[nn.Module]:
        """Return the units, without the model itself."""
        model = self.unwrapped_model
        if self.fsdp_wrap is not None:
            return select_submodules(model, self.fsdp_wrap, f"{type(self).__name__}(fsdp_wrap=[...])")
        from ptacc.engines.fsdp import find_units

        return find_units(model)

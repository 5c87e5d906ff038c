"""Fully sharded data parallelism."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from typing_extensions import override

from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.errors import LaunchError, OptionError
from ptacc.mixins.model_sharding import DATA, ShardFn, ShardingMixin
from ptacc.model.selection import check_choices, chosen_submodules

if TYPE_CHECKING:  # importing it takes longer than all of ptacc
    from torch.distributed.device_mesh import DeviceMesh


class FSDPMixin(ShardingMixin):
    """Deals weights, gradients and the optimizer's state out over the processes: FSDP2, torch's `fully_shard`.

    Each process holds a part of every tensor. A unit of the model is put together when it is called, and let go after
    it, so that a model may be larger than a device. Numbers are those of DDP but for rounding. The user's model is
    sharded in place for a run, and whole again after it. A single process has nothing to share, and trains as without
    this mixin.

    Options:
        fsdp_wrap: Classes of submodules, or their names as in `named_modules()`, in which `*` stands for anything:
            each is put together by itself, with all that lies in it. None for the blocks that a model of transformers
            names, or else for those in each `nn.ModuleList`; `[]` for the model as a whole.
        fsdp_reshard_after_forward: Whether a unit is let go between the forward and the backward pass: less memory,
            and one more exchange.
        fsdp_param_dtype: What units compute in, and are put together in; their own if None.
        fsdp_reduce_dtype: What gradients are averaged in; that of the computation if None.
        fsdp_cpu_offload: Whether shards stay in the host's memory, where the optimizer steps, too. On a GPU only.
        fsdp_unshard_after_run: Whether every process has the whole model after the run. False leaves it in shards,
            where it is too large: evaluations, exports and further runs take it so.

    Hooks: `configure_accelerator`, `shard_functions`, `gives_model_back`, `make_engine`, `around_run`,
    `resume_invariants`.

    Combines with: everything but another engine. Precision by `AMPMixin`, kept activations by `GradCheckpointMixin`.

    Source: Zhao et al., 2023, https://arxiv.org/abs/2304.11277

    Example:
        >>> from ptacc import AMPMixin, FSDPMixin, GradClipMixin, Trainer
        >>> class MyTrainer(AMPMixin, GradClipMixin, FSDPMixin, Trainer):
        ...     max_grad_norm: float | None = 1.0
    """

    fsdp_wrap: Sequence[type[nn.Module] | str] | None = None
    fsdp_reshard_after_forward: bool = True
    fsdp_param_dtype: torch.dtype | None = None
    fsdp_reduce_dtype: torch.dtype | None = None
    fsdp_cpu_offload: bool = False
    fsdp_unshard_after_run: bool = True

    @override
    def check_options(self) -> None:
        """Refuse what is no list of units, and no dtype."""
        owner = type(self).__name__
        if self.fsdp_wrap is not None:
            check_choices(owner, "fsdp_wrap", self.fsdp_wrap)
        for name in ("fsdp_param_dtype", "fsdp_reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                raise OptionError(f"{owner}({name}={dtype!r}): must be a floating dtype, such as torch.bfloat16.")

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Do what the launch asks of FSDP without Accelerate, whose own state would be FSDP's for good."""
        super().configure_accelerator(builder)
        builder.provide("fsdp", hide=True)
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in {"1", "true"} and os.environ.get("FSDP_VERSION") == "1":
            raise LaunchError(
                f"The launch asks for FSDP of version 1, and {type(self).__name__} shards by version 2. Set "
                "`fsdp_version: 2` in the launch's configuration."
            )

    @override
    def shard_functions(self) -> Mapping[str, ShardFn]:
        """Deal replicas out, unit by unit."""
        return {**super().shard_functions(), DATA: self._shard_units}

    @override
    def gives_model_back(self) -> bool:
        """Give it back if asked for."""
        return self.fsdp_unshard_after_run and super().gives_model_back()

    def _shard_units(self, model: nn.Module, mesh: DeviceMesh) -> None:
        if self.fsdp_cpu_offload and self.device.type == "cpu":
            raise OptionError(f"{type(self).__name__}(fsdp_cpu_offload=True) on a CPU: everything is there already.")
        from ptacc.engines.fsdp import Units, shard_units  # importing it takes longer than all of ptacc

        units = Units(
            self._units(),
            self.fsdp_reshard_after_forward,
            self.fsdp_param_dtype,
            self.fsdp_reduce_dtype,
            offloads=self.fsdp_cpu_offload,
        )
        shard_units(model, mesh, units)

    def _units(self) -> list[nn.Module]:
        """Return the submodules that are units, beside the model itself."""
        model = self.unwrapped_model
        if self.fsdp_wrap is not None:
            return chosen_submodules(model, self.fsdp_wrap, f"{type(self).__name__}(fsdp_wrap=[...])")
        names = set(getattr(model, "_no_split_modules", None) or ())
        if names:
            return [module for module in model.modules() if type(module).__name__ in names]
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        return [block for blocks in lists for block in blocks if not isinstance(block, nn.ModuleList | nn.ModuleDict)]

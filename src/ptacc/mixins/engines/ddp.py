"""Torch's DistributedDataParallel."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from typing_extensions import override

from ptacc.core.hooks import Mixin
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.engines.base import Engine
from ptacc.engines.ddp import DDPEngine
from ptacc.validation import check_choice, check_positive

CommHook: TypeAlias = Literal["fp16", "bf16", "power_sgd", "batched_power_sgd"]


class DDPMixin(Mixin):
    """Averages gradients by torch's `DistributedDataParallel` (DDP), for its settings.

    A run trains the same parameters in each step. Steps call the model, its methods and its submodules as without it.

    Options:
        ddp_find_unused_parameters: Whether to search for parameters without a gradient in each forward pass.
        ddp_static_graph: Whether all steps use the same parameters in the same way.
        ddp_gradient_as_bucket_view: Whether gradients are views of the buckets that are sent, which saves memory.
        ddp_bucket_cap_mb: Size of the buckets in MiB.
        ddp_comm_hook: How to compress what is sent: `"fp16"`, `"bf16"`, `"power_sgd"` or `"batched_power_sgd"`.

    Hooks: `configure_accelerator`, `make_engine`.

    Combines with: everything but FSDP, tensor parallelism and DeepSpeed. On a single process it has no effect.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html

    Example:
        >>> from ptacc import DDPMixin, Trainer
        >>> class MyTrainer(DDPMixin, Trainer):
        ...     ddp_find_unused_parameters = True
    """

    ddp_find_unused_parameters: bool = False
    ddp_static_graph: bool = False
    ddp_gradient_as_bucket_view: bool = False
    ddp_bucket_cap_mb: int = 25
    ddp_comm_hook: CommHook | None = None

    @override
    def check_options(self) -> None:
        owner = type(self).__name__
        check_positive(owner, "ddp_bucket_cap_mb", self.ddp_bucket_cap_mb)
        check_choice(owner, "ddp_comm_hook", self.ddp_comm_hook, get_args(CommHook), "no compression")

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        super().configure_accelerator(builder)
        builder.provide("ddp")
        settings = DistributedDataParallelKwargs(
            find_unused_parameters=self.ddp_find_unused_parameters,
            static_graph=self.ddp_static_graph,
            gradient_as_bucket_view=self.ddp_gradient_as_bucket_view,
            bucket_cap_mb=self.ddp_bucket_cap_mb,
            comm_hook=DDPCommunicationHookType(self.ddp_comm_hook or "no"),
        )
        builder.write(DDPMixin, kwargs_handlers=[settings])

    @override
    def make_engine(self) -> Engine:
        if self.accelerator.num_processes == 1:
            return super().make_engine()
        return DDPEngine(self.accelerator, self.unwrapped_model, self.optimizer_slots())

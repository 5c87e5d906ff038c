"""The part of Accelerate that ptacc uses. Accelerate has no types; stubtest compares these stubs with the package."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin as GradientAccumulationPlugin
from torch import Tensor, nn

class Accelerator:
    scaler: torch.amp.GradScaler | None
    ddp_handler: DistributedDataParallelKwargs | None
    _models: list[nn.Module]
    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool = ...,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        dataloader_config: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        rng_types: Any = None,
        log_with: Any = None,
        project_dir: Any = None,
        project_config: Any = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        kwargs_handlers: list[Any] | None = None,
        dynamo_backend: Any = None,
        dynamo_plugin: Any = None,
        deepspeed_plugins: Any = None,
        parallelism_config: Any = None,
    ) -> None: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    @property
    def local_process_index(self) -> int: ...
    @property
    def is_main_process(self) -> bool: ...
    @property
    def is_local_main_process(self) -> bool: ...
    @property
    def mixed_precision(self) -> str: ...
    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module: ...
    def unwrap_model(
        self, model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True
    ) -> nn.Module: ...
    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]: ...
    def autocast(self, autocast_handler: Any = None) -> AbstractContextManager[None]: ...
    def gather(self, tensor: Tensor) -> Tensor: ...
    def reduce(self, tensor: Tensor, reduction: str = "sum", scale: float = 1.0) -> Tensor: ...
    def wait_for_everyone(self) -> None: ...
    def print(self, *args: object, **kwargs: Any) -> None: ...

from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any, Self

from torch.nn.parallel import DistributedDataParallel

class DynamoBackend(str, Enum):  # noqa: UP042  # as in Accelerate
    def __new__(cls, value: object) -> Self: ...
    NO = "NO"
    INDUCTOR = "INDUCTOR"

class GradientAccumulationPlugin:
    def __init__(
        self,
        num_steps: int | None = None,
        adjust_scheduler: bool = True,
        sync_with_dataloader: bool = True,
        sync_each_batch: bool = False,
    ) -> None: ...

class TorchDynamoPlugin:
    # A `DynamoBackend` and a string after construction. The class attributes are None, so stubtest requires Any.
    backend: Any
    mode: Any
    def __init__(
        self,
        backend: str | None = None,
        mode: str | None = None,
        fullgraph: bool | None = None,
        dynamic: bool | None = None,
        options: Any = None,
        disable: bool = False,
        use_regional_compilation: bool | None = None,
    ) -> None: ...

class KwargsHandler: ...

@dataclass
class AutocastKwargs(KwargsHandler):
    enabled: bool = True
    cache_enabled: bool | None = None

class DDPCommunicationHookType(Enum):
    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"

@dataclass
class DistributedDataParallelKwargs(KwargsHandler):
    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: Any = ...
    comm_wrapper: Any = ...
    comm_state_option: dict[str, Any] = ...
    def to_kwargs(self) -> dict[str, Any]: ...
    def register_comm_hook(self, model: DistributedDataParallel) -> None: ...

@dataclass
class GradScalerKwargs(KwargsHandler):
    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    enabled: bool = True

@dataclass
class InitProcessGroupKwargs(KwargsHandler):
    backend: str | None = "nccl"
    init_method: str | None = None
    timeout: timedelta | None = None

@dataclass
class ProfileKwargs(KwargsHandler):
    activities: list[Any] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Any = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

@dataclass
class DataLoaderConfiguration:
    split_batches: bool = False
    dispatch_batches: bool | None = None
    even_batches: bool = True
    use_seedable_sampler: bool = False
    data_seed: int | None = None
    non_blocking: bool = False
    use_stateful_dataloader: bool = False

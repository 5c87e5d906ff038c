"""The part of DeepSpeed that ptacc uses. DeepSpeed has no types; stubtest compares these stubs with the package."""

from typing import Any

from deepspeed import utils as utils
from deepspeed.runtime import zero as zero
from deepspeed.runtime.engine import DeepSpeedEngine as DeepSpeedEngine
from torch import nn
from torch.optim import Optimizer

def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = ...,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[DeepSpeedEngine, Any, Any, Any]: ...
def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = ...,
    verbose: bool = True,
    timeout: Any = ...,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None: ...

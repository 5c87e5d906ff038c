from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

class DeepSpeedEngine(nn.Module):
    optimizer: Any
    device: torch.device
    def __init__(
        self,
        args: Any,
        model: nn.Module,
        optimizer: Any = None,
        model_parameters: Any = None,
        training_data: Any = None,
        lr_scheduler: Any = None,
        mpu: Any = None,
        dist_init_required: bool | None = None,
        collate_fn: Any = None,
        config: Any = None,
        config_class: Any = None,
        mesh_device: Any = None,
        dont_change_device: bool = False,
    ) -> None: ...
    def backward(self, loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> Tensor: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def step(self, lr_kwargs: Any = None) -> None: ...
    def destroy(self) -> None: ...
    # Declared because their parameters differ from those of torch.
    @override
    def compile(
        self,
        backend: Any = ...,
        compile_kwargs: Any = ...,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None: ...
    @override
    def zero_grad(self) -> None: ...  # type: ignore[override]

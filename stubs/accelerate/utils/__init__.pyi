from enum import Enum
from typing import Any, Self

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

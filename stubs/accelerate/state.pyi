from typing import Any

class PartialState:
    _shared_state: dict[str, Any]
    def __init__(self, cpu: bool = False, **kwargs: Any) -> None: ...

class AcceleratorState:
    def __init__(
        self,
        mixed_precision: str | None = None,
        cpu: bool = False,
        dynamo_plugin: Any = None,
        deepspeed_plugin: Any = None,
        fsdp_plugin: Any = None,
        torch_tp_plugin: Any = None,
        megatron_lm_plugin: Any = None,
        parallelism_config: Any = None,
        _from_accelerator: bool = False,
        **kwargs: Any,
    ) -> None: ...
    @staticmethod
    def _reset_state(reset_partial_state: bool = False) -> None: ...

class GradientAccumulationPlugin:
    def __init__(
        self,
        num_steps: int | None = None,
        adjust_scheduler: bool = True,
        sync_with_dataloader: bool = True,
        sync_each_batch: bool = False,
    ) -> None: ...

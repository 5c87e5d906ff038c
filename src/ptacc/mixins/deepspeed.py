"""DeepSpeed's ZeRO."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch.distributed import is_initialized
from typing_extensions import override

from ptacc.callbacks.restore_best_weights import RestoreBestWeights
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.engines.base import Engine
from ptacc.engines.deepspeed.config import ZeroConfig
from ptacc.errors import LaunchError, OptionError
from ptacc.types.aliases import ZeroStage
from ptacc.types.protocols import SupportsGradClip, SupportsSWA


class DeepSpeedMixin(Mixin):
    """Deals the optimizer's state, gradients and weights out over the processes: DeepSpeed's ZeRO.

    Numbers are those of DDP but for rounding, with the user's own model and optimizer: both are plain again after the
    run. Weights are updated in float32. Windows, clipping, schedules, precision and data are the trainer's. A single
    process trains as without this mixin, unless a launcher started it. Without a GPU, DeepSpeed needs a C++ compiler.

    Options:
        zero_stage: 0 for replicas, as DDP has them; 1 deals out the optimizer's state, 2 the gradients, too, 3 the
            weights, too. None for what the configuration says, or the launch, or else 2.
        zero_offload_optimizer: Whether the optimizer's state is in the host's memory, where the optimizer steps, too.
        zero_offload_param: Whether weights are in the host's memory until they are needed. With ZeRO 3 only.
        deepspeed_config: DeepSpeed's own configuration, or its JSON file, for what has no option. Where it says
            `"auto"`, or nothing, the trainer fills in; where it says something else than the trainer, it is refused.
            `bf16.enabled`, with `mixed_precision="bf16"`, has weights put together in bfloat16, beside those in
            float32 that are updated: half the traffic and less memory, and gradients less exact.

    Hooks: `configure_accelerator`, `make_engine`, `on_run_start`, `resume_invariants`.

    Combines with: everything but another engine. Precision by `AMPMixin`: bf16. The optimizer has to treat each entry
    by itself, as Adam does. With ZeRO 1 to 3, `parameter.grad` is empty in `on_gradients_ready`; with ZeRO 3, there
    are no averages of weights (`EMAMixin`, `SWAMixin`, `RestoreBestWeights`), and no `CompileMixin`. A run goes on with
    the same stage and number of processes; its weights load everywhere.

    Source: Rajbhandari et al., 2020, https://arxiv.org/abs/1910.02054

    Example:
        >>> from ptacc import AMPMixin, DeepSpeedMixin, GradClipMixin, Trainer
        >>> from ptacc.protocols import ZeroStage
        >>> class MyTrainer(AMPMixin, GradClipMixin, DeepSpeedMixin, Trainer):
        ...     zero_stage: ZeroStage | None = 3
    """

    zero_stage: ZeroStage | None = None
    zero_offload_optimizer: bool | None = None
    zero_offload_param: bool | None = None
    deepspeed_config: Mapping[str, object] | str | Path | None = None

    @override
    def check_options(self) -> None:
        """Refuse a configuration that cannot be right, and what does not go with weights in parts."""
        config = self._zero_config()
        check_composes(self, config)

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Do what the launch asks of DeepSpeed without Accelerate, whose own state would be DeepSpeed's for good."""
        super().configure_accelerator(builder)
        builder.provide("deepspeed", hide=True)
        clipping = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
        if clipping != "auto" and float(clipping) != (get_max_grad_norm(self) or 0.0):
            raise LaunchError(
                f"The launch set ACCELERATE_GRADIENT_CLIPPING={clipping}, and {type(self).__name__} has "
                f"max_grad_norm={get_max_grad_norm(self)}. Give both the same number, by GradClipMixin."
            )

    @override
    def make_engine(self) -> Engine:
        """Deal the model out, and what the optimizer keeps. A collective."""
        config = self._zero_config()
        accelerator = self.accelerator
        config.check_agrees(
            accumulation=self.accumulation_steps(),
            max_grad_norm=get_max_grad_norm(self),
            precision=accelerator.mixed_precision,
        )
        check_composes(self, config)
        if not self._has_group:
            if config.offload_optimizer or config.offload_param:
                raise LaunchError(
                    f"{type(self).__name__} keeps part of the run in the host's memory, for which DeepSpeed needs a "
                    "launcher, also for one process: `torchrun --nproc-per-node 1`, or `accelerate launch`."
                )
            return super().make_engine()
        if importlib.util.find_spec("deepspeed") is None:
            raise LaunchError(
                f"{type(self).__name__} runs on DeepSpeed, which is not installed: pip install 'ptacc[deepspeed]'."
            )
        from ptacc.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(accelerator, self.unwrapped_model, self.optimizer_slots(), config, self._place())

    @override
    def on_run_start(self) -> None:
        """Refuse a configuration for batches of another size."""
        super().on_run_start()
        size, processes = self.run.options.per_device_batch_size, self.distributed.world_size
        try:
            self._zero_config().check_batch_size(size, self.accumulation_steps(), processes)
        except OptionError:
            self.run.engine.release()  # all processes are here
            raise

    @override
    def resume_invariants(self) -> dict[str, str]:
        """Go on under the same engine: what each process holds of the state is its own."""
        return super().resume_invariants() | {"engine": self._place()}

    @property
    def _has_group(self) -> bool:
        """Whether there are processes to deal to, as a launcher starts them: if only one."""
        return not self._distributed.is_single_process or is_initialized()

    def _place(self) -> str:
        """Tell what has to be the same where the optimizer's state is loaded."""
        stage = self._zero_config().stage
        if not self._has_group:
            return "torch"
        return f"deepspeed zero {stage}" + (f", {self.distributed.world_size} processes" if stage else "")

    def _zero_config(self) -> ZeroConfig:
        options = self.zero_stage, self.zero_offload_optimizer, self.zero_offload_param
        return ZeroConfig.read(type(self).__name__, self.deepspeed_config, *options)


@runtime_checkable
class Averages(Protocol):
    """Trainers that keep a moving average of the weights."""

    ema_decay: float


@runtime_checkable
class Compiles(Protocol):
    """Trainers that compile their model."""

    compile_fullgraph: bool | None


def check_composes(trainer: TrainerCore, config: ZeroConfig) -> None:
    """Raise `OptionError` for what looks at whole weights, where there are none to look at."""
    found = [
        type(callback).__name__ for callback in trainer.all_callbacks() if isinstance(callback, RestoreBestWeights)
    ]
    if isinstance(trainer, Averages):
        found.append("EMAMixin")
    if isinstance(trainer, SupportsSWA) and trainer.swa_start is not None:
        found.append(f"swa_start={trainer.swa_start}")
    where = "ZeRO 3" if config.stage == 3 else "bf16.enabled"
    if found and (config.stage == 3 or config.has_bf16_weights):
        raise OptionError(
            f"{config.owner}: {found[0]} averages or copies the weights, and under {where} no process has them whole "
            "in float32. Use zero_stage=2 without it, or FSDPMixin."
        )
    if config.stage == 3 and isinstance(trainer, Compiles):
        raise OptionError(
            f"{config.owner}: CompileMixin traces whole weights, and ZeRO 3 has parts of them. Use zero_stage=2, or "
            "FSDPMixin."
        )


def get_max_grad_norm(trainer: TrainerCore) -> float | None:
    """Return the norm that a trainer clips gradients to, None if it does not."""
    return trainer.max_grad_norm if isinstance(trainer, SupportsGradClip) else None

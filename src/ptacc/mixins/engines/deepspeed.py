"""DeepSpeed's ZeRO."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from torch.distributed import is_initialized
from typing_extensions import override

from ptacc.callbacks.restore_best_weights import RestoreBestWeights
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.engines.base import Engine
from ptacc.engines.deepspeed.config import ZeroConfig
from ptacc.errors import LaunchError, OptionError
from ptacc.profiling.memory_estimate import ShardCounts
from ptacc.types.aliases import ZeroStage
from ptacc.types.protocols import SupportsGradClip, SupportsSWA
from ptacc.validation import absolute_path


class DeepSpeedMixin(Mixin):
    """Partitions optimizer state, gradients and parameters over the ranks: DeepSpeed's ZeRO.

    Results equal those of replicas up to rounding. The model and the optimizer are the user's own, and are restored
    after the run. Parameters are updated in float32. Accumulation, clipping, schedules, precision and data are
    handled by the trainer. A single process trains as without this mixin, unless a launcher started it. Without a GPU,
    DeepSpeed needs a C++ compiler.

    Options:
        zero_stage: 0 for replicas; 1 partitions the optimizer state, 2 also the gradients, 3 also the
            parameters. None for the stage of the configuration or of the launch, 2 if neither has one.
        zero_offload_optimizer: Whether the optimizer state is kept in host memory, where the optimizer also steps.
        zero_offload_param: Whether parameters are kept in host memory until they are used. With ZeRO 3 only.
        deepspeed_config: DeepSpeed's own configuration, or the path of its JSON file, for settings without an option.
            The trainer fills in missing values and `"auto"`; values that contradict the trainer are refused. With
            `mixed_precision="bf16"`, `bf16.enabled` gathers parameters in bfloat16 while float32 copies are updated:
            half the communication and less memory, and less exact gradients.

    Hooks: `configure_accelerator`, `make_engine`, `on_run_start`, `resume_invariants`.

    Combines with: everything except another engine, with these limits. `AMPMixin`: bf16 only. The optimizer must be
    elementwise, as Adam is. With ZeRO 1 to 3, `parameter.grad` is empty in `on_gradients_ready`. With ZeRO 3, weights
    cannot be averaged (`EMAMixin`, `SWAMixin`, `RestoreBestWeights`) or compiled (`CompileMixin`). A run resumes with
    the same stage and number of processes only; its weights can be loaded by any trainer.

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
    deepspeed_config: Mapping[str, object] | str | os.PathLike[str] | None = None

    @override
    def check_options(self) -> None:
        if isinstance(self.deepspeed_config, str | os.PathLike):
            owner = type(self).__name__
            self.deepspeed_config = absolute_path(owner, "deepspeed_config", self.deepspeed_config)
        check_composes(self, self._zero_config())

    @override
    def configure_accelerator(self, builder: AcceleratorBuilder) -> None:
        """Handle the launch's DeepSpeed settings here: Accelerate would apply them to its process-wide state."""
        super().configure_accelerator(builder)
        builder.provide("deepspeed", hide=True)
        clipping, norm = os.environ.get("ACCELERATE_GRADIENT_CLIPPING", "auto"), get_max_grad_norm(self)
        if clipping != "auto" and float(clipping) != (norm or 0.0):
            raise LaunchError(
                f"The launch sets ACCELERATE_GRADIENT_CLIPPING={clipping}, and {type(self).__name__} has "
                f"max_grad_norm={norm}. Give both the same number, with GradClipMixin."
            )
        if names := os.environ.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"):
            raise LaunchError(
                f"The launch sets ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES={names}, which {type(self).__name__} does "
                "not support. Leave it out."
            )

    @override
    def make_engine(self) -> Engine:
        """Partition the model and the optimizer's state. A collective.

        Raises:
            LaunchError: DeepSpeed is not installed, or was not started by a launcher and offloads.
        """
        config, accelerator = self._zero_config(), self.accelerator
        config.check_agrees(
            accumulation=self._accumulation(),
            max_grad_norm=get_max_grad_norm(self),
            precision=accelerator.mixed_precision,
        )
        check_composes(self, config)
        if not self._has_group:
            if config.offload_optimizer or config.offload_param:
                raise LaunchError(
                    f"{type(self).__name__} offloads to host memory, for which DeepSpeed needs a launcher, "
                    "also for one process: `torchrun --nproc-per-node 1`, or `accelerate launch`."
                )
            return super().make_engine()
        if importlib.util.find_spec("deepspeed") is None:
            raise LaunchError(
                f"{type(self).__name__} needs DeepSpeed, which is not installed: pip install 'ptacc[deepspeed]'."
            )
        from ptacc.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(accelerator, self.unwrapped_model, self.optimizer_slots(), config, self._layout())

    @override
    def on_run_start(self) -> None:
        super().on_run_start()
        size, processes = self.run.options.get("per_device_batch_size"), self.distributed.world_size
        try:
            self._zero_config().check_batch_size(size, self._accumulation(), processes)
        except OptionError:
            self.run.engine.release()  # every rank raises
            raise

    @override
    def resume_invariants(self) -> dict[str, str]:
        return super().resume_invariants() | {"engine": self._layout()}

    @override
    def _shard_counts(self) -> ShardCounts:
        stage, ranks = self._zero_config().stage, self.distributed.world_size
        return ShardCounts(*(ranks if stage >= first else 1 for first in (3, 2, 1)))

    @property
    def _has_group(self) -> bool:
        """Whether a launcher has started the ranks, even if only one."""
        return not self._distributed.is_single_process or is_initialized()

    def _layout(self) -> str:
        """Return how the optimizer state is partitioned. It can only be loaded into the same layout."""
        stage = self._zero_config().stage
        if not self._has_group:
            return "torch"
        return f"deepspeed zero {stage}" + (f", {self.distributed.world_size} processes" if stage else "")

    def _zero_config(self) -> ZeroConfig:
        options = self.zero_stage, self.zero_offload_optimizer, self.zero_offload_param
        return ZeroConfig.read(type(self).__name__, self.deepspeed_config, *options)


def check_composes(trainer: TrainerCore, config: ZeroConfig) -> None:
    """Raise `OptionError` for mixins and callbacks that need full float32 parameters if no rank has them."""
    callbacks = [callback for callback in trainer.all_callbacks() if isinstance(callback, RestoreBestWeights)]
    found = [type(callback).__name__ for callback in callbacks]
    if hasattr(trainer, "ema_decay"):
        found.append("EMAMixin")
    if isinstance(trainer, SupportsSWA) and trainer.swa_start is not None:
        found.append(f"swa_start={trainer.swa_start}")
    if getattr(trainer, "spike_action", "clip") != "clip":
        raise OptionError(f'{config.owner}: DeepSpeed cannot skip a step. Use spike_action="clip", or FSDPMixin.')
    where = "ZeRO 3" if config.stage == 3 else "bf16.enabled"
    if found and (config.stage == 3 or config.has_bf16_weights):
        raise OptionError(
            f"{config.owner}: {found[0]} averages or copies the weights, and under {where} no rank has all of them in "
            "float32. Use zero_stage=2 without it, or FSDPMixin."
        )
    if config.stage == 3 and hasattr(trainer, "compile_fullgraph"):
        raise OptionError(
            f"{config.owner}: CompileMixin traces full parameters, and ZeRO 3 partitions them. Use zero_stage=2, or "
            "FSDPMixin."
        )


def get_max_grad_norm(trainer: TrainerCore) -> float | None:
    """Return the `max_grad_norm` of a trainer, None without `GradClipMixin`."""
    return trainer.max_grad_norm if isinstance(trainer, SupportsGradClip) else None

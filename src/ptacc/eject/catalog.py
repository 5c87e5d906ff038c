"""Which mixins and callbacks a script has, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ptacc.callbacks.nonfinite import StopOnNonFinite
from ptacc.callbacks.print_metrics import PrintMetrics
from ptacc.callbacks.progress_bar import ProgressBar
from ptacc.callbacks.restore_best_weights import RestoreBestWeights
from ptacc.eject import evaluation, launching, optimization
from ptacc.eject.fragment import Fragment, Target
from ptacc.mixins.amp import AMPMixin
from ptacc.mixins.checkpoint import CheckpointMixin
from ptacc.mixins.closure import ClosureMixin
from ptacc.mixins.compile import CompileMixin
from ptacc.mixins.early_stopping import EarlyStoppingMixin
from ptacc.mixins.ema import EMAMixin
from ptacc.mixins.engines.ddp import DDPMixin
from ptacc.mixins.engines.deepspeed import DeepSpeedMixin
from ptacc.mixins.engines.fsdp import FSDPMixin
from ptacc.mixins.engines.tensor_parallel import TensorParallelMixin
from ptacc.mixins.freeze import FreezeMixin
from ptacc.mixins.grad_accum import GradAccumMixin
from ptacc.mixins.grad_checkpoint import GradCheckpointMixin
from ptacc.mixins.grad_clip import GradClipMixin
from ptacc.mixins.lr_scheduler import LRSchedulerMixin
from ptacc.mixins.metrics import MetricsMixin
from ptacc.mixins.mixup import MixUpMixin
from ptacc.mixins.profiler import ProfilerMixin
from ptacc.mixins.seed import SeedMixin
from ptacc.mixins.swa import SWAMixin
from ptacc.mixins.sync_batch_norm import SyncBatchNormMixin
from ptacc.mixins.tracking import TrackingMixin

MIXINS: Mapping[type, Callable[[Target], Fragment]] = {
    SeedMixin: launching.seed,
    AMPMixin: launching.amp,
    DDPMixin: launching.ddp,
    CompileMixin: launching.compiled,
    SyncBatchNormMixin: launching.sync_batch_norm,
    FreezeMixin: launching.freezing,
    EMAMixin: launching.ema,
    SWAMixin: launching.swa,
    GradCheckpointMixin: launching.grad_checkpoint,  # after copies of the model
    GradAccumMixin: optimization.grad_accum,
    GradClipMixin: optimization.grad_clip,
    LRSchedulerMixin: optimization.lr_scheduler,
    MetricsMixin: evaluation.metrics,
    EarlyStoppingMixin: evaluation.early_stopping,
}
"""The mixins that a script has, in the order of their statements in it."""

LEFT_OUT: Mapping[type, str] = {
    CheckpointMixin: (
        "a run does not resume. `accelerator.save_state` saves the model, the optimizer and the generators, not the "
        "position in the data."
    ),
    ClosureMixin: "the loss is computed once. Pass `optimizer.step` a closure that computes it again.",
    MixUpMixin: "batches are not mixed. `torchvision.transforms.v2.MixUp` and `CutMix` mix in a `collate_fn`.",
    FSDPMixin: "each process has all of the model. See `FullyShardedDataParallelPlugin` of Accelerate.",
    DeepSpeedMixin: "each process has all of the model. See `DeepSpeedPlugin` of Accelerate.",
    TensorParallelMixin: "each process has all of the model. See `torch.distributed.tensor.parallel`.",
    ProfilerMixin: "nothing is traced. See `torch.profiler.profile`.",
    TrackingMixin: "values are printed only. See `Accelerator(log_with=...)` and `accelerator.log`.",
}
"""The mixins that a script leaves out, with what that means and what to use in their place."""

CALLBACKS: Mapping[type, Callable[[Target, Any], Fragment]] = {
    RestoreBestWeights: evaluation.restore_best_weights,
    StopOnNonFinite: evaluation.stop_on_non_finite,
}
REPLACED_CALLBACKS = (PrintMetrics, ProgressBar)
"""Callbacks in whose place a script prints a line an epoch."""

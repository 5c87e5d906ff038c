"""ptacc: trainers for PyTorch, composed from small typed mixins, on Hugging Face Accelerate."""

import ptacc.public
from ptacc.callbacks.defaults import default_callbacks
from ptacc.callbacks.memory_snapshot import MemorySnapshot
from ptacc.callbacks.nonfinite import StopOnNonFinite
from ptacc.callbacks.print_metrics import PrintMetrics
from ptacc.callbacks.progress_bar import ProgressBar
from ptacc.callbacks.restore_best_weights import RestoreBestWeights
from ptacc.callbacks.save_best import SaveBest
from ptacc.callbacks.throughput import Throughput
from ptacc.composition.composable import hook, replaces_super
from ptacc.core.batch_hooks import BatchMixin
from ptacc.core.callback import Callback
from ptacc.core.hooks import Mixin, TrainerCore
from ptacc.data.dataloader_config import DataLoaderConfig
from ptacc.distributed.accelerator import AcceleratorBuilder
from ptacc.loop.loop import TrainingLoop
from ptacc.loop.updates import MultiUpdateLoop
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
from ptacc.model.decay_groups import decay_groups
from ptacc.model.freezing import gradual_unfreezing
from ptacc.model.optimizer_dict import OptimizerDict
from ptacc.run.history import RunHistory
from ptacc.run.run import Run
from ptacc.run.state import StateKey
from ptacc.run.step_result import StepResult
from ptacc.trainers.supervised import Trainer
from ptacc.types.aliases import Pair
from ptacc.types.monitor import Best, Monitor
from ptacc.types.outputs import (
    EpochRecord,
    EvalResult,
    EvaluationRecord,
    StepOutput,
    StepRecord,
    Update,
    ValuesRecord,
)
from ptacc.types.progress import Cadence, Epochs, Items, Minutes, Progress, RunPlan, Steps

__all__ = [
    "AMPMixin",
    "AcceleratorBuilder",
    "BatchMixin",
    "Best",
    "Cadence",
    "Callback",
    "CheckpointMixin",
    "ClosureMixin",
    "CompileMixin",
    "DDPMixin",
    "DataLoaderConfig",
    "DeepSpeedMixin",
    "EMAMixin",
    "EarlyStoppingMixin",
    "EpochRecord",
    "Epochs",
    "EvalResult",
    "EvaluationRecord",
    "FSDPMixin",
    "FreezeMixin",
    "GradAccumMixin",
    "GradCheckpointMixin",
    "GradClipMixin",
    "Items",
    "LRSchedulerMixin",
    "MemorySnapshot",
    "MetricsMixin",
    "Minutes",
    "MixUpMixin",
    "Mixin",
    "Monitor",
    "MultiUpdateLoop",
    "OptimizerDict",
    "Pair",
    "PrintMetrics",
    "ProfilerMixin",
    "Progress",
    "ProgressBar",
    "RestoreBestWeights",
    "Run",
    "RunHistory",
    "RunPlan",
    "SWAMixin",
    "SaveBest",
    "SeedMixin",
    "StateKey",
    "StepOutput",
    "StepRecord",
    "StepResult",
    "Steps",
    "StopOnNonFinite",
    "SyncBatchNormMixin",
    "TensorParallelMixin",
    "Throughput",
    "TrackingMixin",
    "Trainer",
    "TrainerCore",
    "TrainingLoop",
    "Update",
    "ValuesRecord",
    "decay_groups",
    "default_callbacks",
    "gradual_unfreezing",
    "hook",
    "replaces_super",
]

ptacc.public.set_public_module(__name__, __all__)

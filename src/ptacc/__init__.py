"""ptacc: trainers for PyTorch, composed from small typed mixins, on Hugging Face Accelerate."""

import ptacc.public
from ptacc.callbacks.defaults import default_callbacks as default_callbacks
from ptacc.callbacks.nonfinite import StopOnNonFinite as StopOnNonFinite
from ptacc.callbacks.print_metrics import PrintMetrics as PrintMetrics
from ptacc.callbacks.progress_bar import ProgressBar as ProgressBar
from ptacc.callbacks.restore_best_weights import RestoreBestWeights as RestoreBestWeights
from ptacc.callbacks.save_best import SaveBest as SaveBest
from ptacc.callbacks.throughput import Throughput as Throughput
from ptacc.composition.composable import hook as hook
from ptacc.composition.composable import replaces_super as replaces_super
from ptacc.core.batch_hooks import BatchMixin as BatchMixin
from ptacc.core.callback import Callback as Callback
from ptacc.core.hooks import Mixin as Mixin
from ptacc.core.hooks import TrainerCore as TrainerCore
from ptacc.data.dataloader_config import DataLoaderConfig as DataLoaderConfig
from ptacc.distributed.accelerator import AcceleratorBuilder as AcceleratorBuilder
from ptacc.distributed.process_group import Distributed as Distributed
from ptacc.engines.base import OptimizerSlot as OptimizerSlot
from ptacc.loop.explain import Explanation as Explanation
from ptacc.loop.loop import TrainingLoop as TrainingLoop
from ptacc.mixins.amp import AMPMixin as AMPMixin
from ptacc.mixins.checkpoint import CheckpointMixin as CheckpointMixin
from ptacc.mixins.compile import CompileMixin as CompileMixin
from ptacc.mixins.deepspeed import DeepSpeedMixin as DeepSpeedMixin
from ptacc.mixins.early_stopping import EarlyStoppingMixin as EarlyStoppingMixin
from ptacc.mixins.ema import EMAMixin as EMAMixin
from ptacc.mixins.fsdp import FSDPMixin as FSDPMixin
from ptacc.mixins.grad_accum import GradAccumMixin as GradAccumMixin
from ptacc.mixins.grad_checkpoint import GradCheckpointMixin as GradCheckpointMixin
from ptacc.mixins.grad_clip import GradClipMixin as GradClipMixin
from ptacc.mixins.lr_scheduler import LRSchedulerMixin as LRSchedulerMixin
from ptacc.mixins.metrics import MetricsMixin as MetricsMixin
from ptacc.mixins.profiler import ProfilerMixin as ProfilerMixin
from ptacc.mixins.seed import SeedMixin as SeedMixin
from ptacc.mixins.swa import SWAMixin as SWAMixin
from ptacc.mixins.sync_batch_norm import SyncBatchNormMixin as SyncBatchNormMixin
from ptacc.mixins.tensor_parallel import TensorParallelMixin as TensorParallelMixin
from ptacc.profiling.throughput import ThroughputRecord as ThroughputRecord
from ptacc.profiling.trace import Profile as Profile
from ptacc.run.history import RunHistory as RunHistory
from ptacc.run.history import StepResult as StepResult
from ptacc.run.run import Run as Run
from ptacc.run.state import ResumeState as ResumeState
from ptacc.run.state import StateKey as StateKey
from ptacc.trainers.supervised import Trainer as Trainer
from ptacc.tuning.batch_size import BatchSizeSearch as BatchSizeSearch
from ptacc.tuning.batch_size import find_batch_size as find_batch_size
from ptacc.tuning.learning_rate import LearningRateSearch as LearningRateSearch
from ptacc.tuning.learning_rate import find_learning_rate as find_learning_rate
from ptacc.types.aliases import Pair as Pair
from ptacc.types.monitor import Best as Best
from ptacc.types.monitor import Monitor as Monitor
from ptacc.types.outputs import EpochRecord as EpochRecord
from ptacc.types.outputs import EvalResult as EvalResult
from ptacc.types.outputs import StepOutput as StepOutput
from ptacc.types.outputs import StepRecord as StepRecord
from ptacc.types.progress import Cadence as Cadence
from ptacc.types.progress import Epochs as Epochs
from ptacc.types.progress import Minutes as Minutes
from ptacc.types.progress import Progress as Progress
from ptacc.types.progress import RunPlan as RunPlan
from ptacc.types.progress import Steps as Steps

__all__ = [
    "AMPMixin",
    "AcceleratorBuilder",
    "BatchMixin",
    "BatchSizeSearch",
    "Best",
    "Cadence",
    "Callback",
    "CheckpointMixin",
    "CompileMixin",
    "DataLoaderConfig",
    "DeepSpeedMixin",
    "Distributed",
    "EMAMixin",
    "EarlyStoppingMixin",
    "EpochRecord",
    "Epochs",
    "EvalResult",
    "Explanation",
    "FSDPMixin",
    "GradAccumMixin",
    "GradCheckpointMixin",
    "GradClipMixin",
    "LRSchedulerMixin",
    "LearningRateSearch",
    "MetricsMixin",
    "Minutes",
    "Mixin",
    "Monitor",
    "OptimizerSlot",
    "Pair",
    "PrintMetrics",
    "Profile",
    "ProfilerMixin",
    "Progress",
    "ProgressBar",
    "RestoreBestWeights",
    "ResumeState",
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
    "ThroughputRecord",
    "Trainer",
    "TrainerCore",
    "TrainingLoop",
    "default_callbacks",
    "find_batch_size",
    "find_learning_rate",
    "hook",
    "replaces_super",
]

ptacc.public.set_public_module(__name__, __all__)

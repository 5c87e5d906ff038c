"""ptacc: trainers for PyTorch, composed from small typed mixins, on Hugging Face Accelerate."""

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
from ptacc.engines.base import Engine as Engine
from ptacc.engines.base import OptimizerSlot as OptimizerSlot
from ptacc.errors import AcceleratorConflictError as AcceleratorConflictError
from ptacc.errors import CheckpointError as CheckpointError
from ptacc.errors import CollectiveError as CollectiveError
from ptacc.errors import CompositionError as CompositionError
from ptacc.errors import DamagedCheckpointError as DamagedCheckpointError
from ptacc.errors import DataError as DataError
from ptacc.errors import LaunchError as LaunchError
from ptacc.errors import LossError as LossError
from ptacc.errors import MissingPartError as MissingPartError
from ptacc.errors import ModelError as ModelError
from ptacc.errors import MonitorError as MonitorError
from ptacc.errors import NestedRunError as NestedRunError
from ptacc.errors import NoRunError as NoRunError
from ptacc.errors import OptionError as OptionError
from ptacc.errors import PtaccError as PtaccError
from ptacc.errors import RankFailedError as RankFailedError
from ptacc.errors import SchedulerError as SchedulerError
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
from ptacc.types.aliases import CompileBackend as CompileBackend
from ptacc.types.aliases import CompileMode as CompileMode
from ptacc.types.aliases import Pair as Pair
from ptacc.types.aliases import PairSample as PairSample
from ptacc.types.aliases import Precision as Precision
from ptacc.types.aliases import ZeroStage as ZeroStage
from ptacc.types.arguments import DataLoaderKwargs as DataLoaderKwargs
from ptacc.types.arguments import EvalOptions as EvalOptions
from ptacc.types.arguments import TrainOptions as TrainOptions
from ptacc.types.monitor import Best as Best
from ptacc.types.monitor import Monitor as Monitor
from ptacc.types.outputs import EpochRecord as EpochRecord
from ptacc.types.outputs import EvalResult as EvalResult
from ptacc.types.outputs import Predictions as Predictions
from ptacc.types.outputs import StepOutput as StepOutput
from ptacc.types.outputs import StepRecord as StepRecord
from ptacc.types.progress import Cadence as Cadence
from ptacc.types.progress import Epochs as Epochs
from ptacc.types.progress import Minutes as Minutes
from ptacc.types.progress import Progress as Progress
from ptacc.types.progress import RunPlan as RunPlan
from ptacc.types.progress import Steps as Steps
from ptacc.types.protocols import AcceleratorProtocol as AcceleratorProtocol
from ptacc.types.protocols import LRSchedulerLike as LRSchedulerLike
from ptacc.types.protocols import MetricLike as MetricLike
from ptacc.types.protocols import PlateauSchedulerLike as PlateauSchedulerLike
from ptacc.types.protocols import SchedulerFactory as SchedulerFactory
from ptacc.types.protocols import SizedDataset as SizedDataset
from ptacc.types.protocols import Stateful as Stateful
from ptacc.types.protocols import SupportsCheckpoint as SupportsCheckpoint
from ptacc.types.protocols import SupportsGradAccum as SupportsGradAccum
from ptacc.types.protocols import SupportsGradClip as SupportsGradClip
from ptacc.types.protocols import SupportsLRScheduler as SupportsLRScheduler
from ptacc.types.protocols import SupportsMetrics as SupportsMetrics
from ptacc.types.protocols import SupportsMixedPrecision as SupportsMixedPrecision
from ptacc.types.protocols import SupportsSeed as SupportsSeed
from ptacc.types.protocols import SupportsSWA as SupportsSWA
from ptacc.types.protocols import SupportsSyncBatchNorm as SupportsSyncBatchNorm

__all__ = [
    "AMPMixin",
    "AcceleratorBuilder",
    "AcceleratorConflictError",
    "AcceleratorProtocol",
    "BatchMixin",
    "BatchSizeSearch",
    "Best",
    "Cadence",
    "Callback",
    "CheckpointError",
    "CheckpointMixin",
    "CollectiveError",
    "CompileBackend",
    "CompileMixin",
    "CompileMode",
    "CompositionError",
    "DamagedCheckpointError",
    "DataError",
    "DataLoaderConfig",
    "DataLoaderKwargs",
    "DeepSpeedMixin",
    "Distributed",
    "EMAMixin",
    "EarlyStoppingMixin",
    "Engine",
    "EpochRecord",
    "Epochs",
    "EvalOptions",
    "EvalResult",
    "Explanation",
    "FSDPMixin",
    "GradAccumMixin",
    "GradCheckpointMixin",
    "GradClipMixin",
    "LRSchedulerLike",
    "LRSchedulerMixin",
    "LaunchError",
    "LearningRateSearch",
    "LossError",
    "MetricLike",
    "MetricsMixin",
    "Minutes",
    "MissingPartError",
    "Mixin",
    "ModelError",
    "Monitor",
    "MonitorError",
    "NestedRunError",
    "NoRunError",
    "OptimizerSlot",
    "OptionError",
    "Pair",
    "PairSample",
    "PlateauSchedulerLike",
    "Precision",
    "Predictions",
    "PrintMetrics",
    "Profile",
    "ProfilerMixin",
    "Progress",
    "ProgressBar",
    "PtaccError",
    "RankFailedError",
    "RestoreBestWeights",
    "ResumeState",
    "Run",
    "RunHistory",
    "RunPlan",
    "SWAMixin",
    "SaveBest",
    "SchedulerError",
    "SchedulerFactory",
    "SeedMixin",
    "SizedDataset",
    "StateKey",
    "Stateful",
    "StepOutput",
    "StepRecord",
    "StepResult",
    "Steps",
    "StopOnNonFinite",
    "SupportsCheckpoint",
    "SupportsGradAccum",
    "SupportsGradClip",
    "SupportsLRScheduler",
    "SupportsMetrics",
    "SupportsMixedPrecision",
    "SupportsSWA",
    "SupportsSeed",
    "SupportsSyncBatchNorm",
    "SyncBatchNormMixin",
    "TensorParallelMixin",
    "Throughput",
    "ThroughputRecord",
    "TrainOptions",
    "Trainer",
    "TrainerCore",
    "TrainingLoop",
    "ZeroStage",
    "default_callbacks",
    "find_batch_size",
    "find_learning_rate",
    "hook",
    "replaces_super",
]

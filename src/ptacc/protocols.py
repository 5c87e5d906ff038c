"""Types for annotations: protocols, type aliases, keyword dictionaries, and classes that only ptacc makes.

Annotate callbacks and functions with a protocol, not with a mixin: a `Callback[SupportsMetrics]` works with every
trainer that has metrics.
"""

import ptacc.public
from ptacc.distributed.process_group import Distributed
from ptacc.engines.base import Engine, EngineState, OptimizerSlot
from ptacc.loop.explain import Explanation
from ptacc.profiling.throughput import ThroughputRecord
from ptacc.profiling.trace import Profile
from ptacc.run.state import ResumeState
from ptacc.tracking.tracker import ConfigValue, HasLastStep, TrackedRun, Tracker, TracksImages
from ptacc.types.accumulation import AccumulationSchedule
from ptacc.types.aliases import CompileBackend, CompileMode, NumpyLike, PairSample, Precision, ZeroStage
from ptacc.types.arguments import DataLoaderKwargs, EvalOptions, TrainOptions
from ptacc.types.protocols import (
    AcceleratorProtocol,
    CountedSchedulerLike,
    HasForward,
    HasModel,
    LRSchedulerLike,
    MetricLike,
    PlateauSchedulerLike,
    SchedulerFactory,
    SchedulerLike,
    SizedDataset,
    Stateful,
    StreamLike,
    SupportsCheckpoint,
    SupportsGradAccum,
    SupportsGradClip,
    SupportsLRScheduler,
    SupportsMetrics,
    SupportsMixedPrecision,
    SupportsSeed,
    SupportsSWA,
    SupportsSyncBatchNorm,
)

__all__ = [
    "AcceleratorProtocol",
    "AccumulationSchedule",
    "CompileBackend",
    "CompileMode",
    "ConfigValue",
    "CountedSchedulerLike",
    "DataLoaderKwargs",
    "Distributed",
    "Engine",
    "EngineState",
    "EvalOptions",
    "Explanation",
    "HasForward",
    "HasLastStep",
    "HasModel",
    "LRSchedulerLike",
    "MetricLike",
    "NumpyLike",
    "OptimizerSlot",
    "PairSample",
    "PlateauSchedulerLike",
    "Precision",
    "Profile",
    "ResumeState",
    "SchedulerFactory",
    "SchedulerLike",
    "SizedDataset",
    "Stateful",
    "StreamLike",
    "SupportsCheckpoint",
    "SupportsGradAccum",
    "SupportsGradClip",
    "SupportsLRScheduler",
    "SupportsMetrics",
    "SupportsMixedPrecision",
    "SupportsSWA",
    "SupportsSeed",
    "SupportsSyncBatchNorm",
    "ThroughputRecord",
    "TrackedRun",
    "Tracker",
    "TracksImages",
    "TrainOptions",
    "ZeroStage",
]

ptacc.public.set_public_module(__name__, __all__)

"""The options with which the laws of composition test ptacc's own mixins."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from torch.optim.lr_scheduler import ConstantLR

from ptacc.core.hooks import Mixin
from ptacc.mixins.checkpoint import CheckpointMixin
from ptacc.mixins.compile import CompileMixin
from ptacc.mixins.ema import EMAMixin
from ptacc.mixins.lr_scheduler import LRSchedulerMixin
from ptacc.mixins.profiler import ProfilerMixin
from ptacc.mixins.tensor_parallel import TensorParallelMixin


def make_directory() -> str:
    """Make a directory that is removed when the process ends."""
    directory = tempfile.TemporaryDirectory(prefix="ptacc-")
    atexit.register(directory.cleanup)
    return directory.name


MIXIN_OPTIONS: Mapping[type[Mixin], Callable[[], Mapping[str, Any]]] = {
    CheckpointMixin: lambda: {"checkpoint_dir": make_directory()},
    CompileMixin: lambda: {"compile_backend": "eager"},
    EMAMixin: lambda: {"ema_decay": 0.0},
    LRSchedulerMixin: lambda: {"create_scheduler": lambda optimizer, _: ConstantLR(optimizer, factor=1.0)},
    ProfilerMixin: lambda: {"profile_wait": 1, "profile_warmup": 1},  # within the few steps of the laws
    TensorParallelMixin: lambda: {"tensor_parallel_plan": {}},  # the model of the laws has no layers to split
}
"""Makes the options of one trainer: those without a default, and those that let its mixin act in a short run.

The values change nothing: the average is the current weights, the schedule is constant, the backend compiles nothing.
"""


def make_options(*mixins: type[Mixin]) -> dict[str, Any]:
    """Return options for one trainer of some mixins, or of classes derived from ptacc's own."""
    options: dict[str, Any] = {}
    for mixin, make in MIXIN_OPTIONS.items():
        if any(mixin in composed.__mro__ for composed in mixins):
            options |= make()
    return options

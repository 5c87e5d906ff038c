"""The default callbacks of every trainer."""

from __future__ import annotations

from ptacc.callbacks.nonfinite import StopOnNonFinite
from ptacc.callbacks.print_metrics import PrintMetrics
from ptacc.callbacks.progress_bar import ProgressBar
from ptacc.core.callback import Callback
from ptacc.core.hooks import TrainerCore


def default_callbacks() -> list[Callback[TrainerCore]]:
    """Create the default callbacks: `StopOnNonFinite`, `ProgressBar` and `PrintMetrics`."""
    return [StopOnNonFinite(), ProgressBar(), PrintMetrics()]
